"""Event files of any layout, opened and read: Parquet, CSV and JSON lines, and logs with one folder per day."""
