"""Adapters to the world: stages as Prefect tasks, the artifact store, MLflow, servers."""
