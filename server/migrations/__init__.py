"""The steps from one schema of the coordinator's database to the next, run by alembic."""
