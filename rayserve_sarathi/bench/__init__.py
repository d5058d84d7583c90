"""Load for a server that runs, and what is seen of it from outside: `sarathi bench`, `sarathi capacity --url`."""
