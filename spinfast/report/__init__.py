"""`spinfast report RUN [RUN ...]`: one HTML file to look at, PNG and CSV of every plot, model cards."""
