"""Measured numbers as files of the repository, and pages that are written from them.

`python -m dcr.record` writes a record, a CSV file with a row for each number; `origins` says where
a number comes from, and which code measured it; `pages` writes numbers of records into documents.
"""
