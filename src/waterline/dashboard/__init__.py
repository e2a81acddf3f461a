"""What operators look at and steer with: a page, metrics and the admin API, on a listener of their own.

It is handed the service as `Operations` and knows nothing else of it.
"""

from waterline.dashboard.access import Access, admin_key, is_loopback
from waterline.dashboard.routes import Operations, make_app

__all__ = ["Access", "Operations", "admin_key", "is_loopback", "make_app"]
