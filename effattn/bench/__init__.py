"""One attention, of a user's sizes, mask and score, timed by effattn and by its peers: ``effattn bench``."""
