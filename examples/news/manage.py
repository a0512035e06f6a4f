#!/usr/bin/env python
"""Django's command line for the news example."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "news_api.settings")
    try:
        from django.core.management import execute_from_command_line
    except ImportError as exc:
        raise ImportError(
            "Django is not installed here. Activate the virtualenv of the example, "
            "or install it with: pip install 'django>=5.2'"
        ) from exc
    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
