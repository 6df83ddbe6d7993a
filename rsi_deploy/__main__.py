"""`python -m rsi_deploy` is `rsi-deploy`."""

from rsi_deploy.cli import main

if __name__ == "__main__":
    main()
