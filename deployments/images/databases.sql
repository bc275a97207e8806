-- PostgreSQL's image runs this when its volume is new; Prefect's database is there already.
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_logins;
