"""Names of the files that the page of a run has."""

PAGE = "report.html"
"""The page, in the run's folder. It shows training pictures, so that it is not pushed to the Hub."""
DATA = "report_data.json"
"""What a page is made of and no other file holds, in the folder of the boards."""
COMPARISON = "comparison.html"
"""The page that compares several runs, unless the user names another file."""
