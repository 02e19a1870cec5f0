"""Where the tasks of a sweep run: side by side on this machine, or as jobs of a Slurm cluster."""
