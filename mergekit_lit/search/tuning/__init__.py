"""This folder is the search for a merge: methods and their parameters, by validation images."""
