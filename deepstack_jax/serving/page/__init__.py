"""The page in a browser that every role serves at /: its files, its pictures, and what it asks the server."""
