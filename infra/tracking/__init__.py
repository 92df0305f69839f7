"""MLflow's server behind passwords: who may ask for what is decided before MLflow sees a request."""
