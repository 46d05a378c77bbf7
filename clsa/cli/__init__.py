"""The command line: one file a command, each parses and then calls one function.

In come the words after `clsa`. Out go a few printed lines and an exit code. torch is imported only
inside the commands, so that help and errors come at once.

    command.py  what every command shares
    pictures/   commands about pictures
    show/       commands that list what there is to choose from
    use/        commands that judge, look into and use a run
    train/      commands that train
    main.py     the list of commands; errors to exit codes
"""
