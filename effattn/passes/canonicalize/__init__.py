"""Before matching: what users write in many ways is brought into one, and put back where no site used it."""
