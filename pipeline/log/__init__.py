"""Opens and reads event files of any layout: Parquet, CSV and JSON lines, and logs with one folder per day."""
