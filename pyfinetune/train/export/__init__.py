"""A trained model in the form it is used in, proved equal to what was trained."""
