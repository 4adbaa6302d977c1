"""DECIDE: what a job is, who runs next, one attempt at a job, and the manager that applications talk to."""
