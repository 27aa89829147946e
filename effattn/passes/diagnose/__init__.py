"""Better reasons for softmaxes that are left alone."""
