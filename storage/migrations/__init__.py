"""The schema's history. Run by :meth:`storage.database.Database.migrate`; there is no ini file and no command of alembic's."""
