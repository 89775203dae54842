"""Every declared method as the tests make it, for a training set of 1,047 digits, ids 250 to 1,296."""
from datasel_wb.datasets import DataRecipe, load_data
from datasel_wb.registry import trials

DATA = load_data(DataRecipe(dataset="digits", dev_size=250, noise=0.2))
METHODS = trials("images")
