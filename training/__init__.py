"""From a data set to a trained .keras file, and the tables of the paper."""
