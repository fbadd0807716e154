"""The roles that come with the package, one module each; imported in workers only."""
