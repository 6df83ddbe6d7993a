"""The kernel of `rsi_deploy.rsi`: products, orthogonalization, routes, their costs and certified norms. torch alone."""
