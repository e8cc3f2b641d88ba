"""One module per subcommand: SUMMARY, EXAMPLES, add_arguments(parser), run(arguments) -> exit code."""
