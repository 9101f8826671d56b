"""Sets of runs, and what is read from them: tables, pictures, a report."""
