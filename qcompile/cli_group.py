"""Which command a command line is."""

from __future__ import annotations

import click


class CompileByDefault(click.Group):
    """``qcompile MODEL`` is ``qcompile compile MODEL``: a first word that is no command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["compile", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Options may stand before MODEL; those of the group itself are --help and --version.
        if args and args[0].startswith("-") and args[0] not in ("--help", "--version"):
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("qcompile", "MODEL [OPTIONS]  |  COMMAND [ARGS]")
