"""Who may call a service, and as which tenant: what its HTTP and gRPC ports check before they handle a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.api_keys import ApiKeys, set_account
from vitrine_vlm.service_runtime.api_keys_file import MAX_TENANT_LENGTH, KeysFile
from vitrine_vlm.service_runtime.logs import set_key_name
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tenants import set_tenant

_AUTHORIZATION = "authorization"


class Access:
    """
    Args:
        keys: None where no key is needed.
        keys_file: from where they come, to be read again when it changes.
        tenant_header: the header that a trusted proxy sets, in lower case; None where there is none.
        tenant: of requests whose key and header state none.
    """

    def __init__(
        self,
        keys: ApiKeys | None = None,
        keys_file: KeysFile | None = None,
        tenant_header: str | None = None,
        tenant: str = "",
    ) -> None:
        self._keys = keys
        self._keys_file = keys_file
        self._tenant_header = tenant_header
        self._tenant = tenant

    @property
    def needs_key(self) -> bool:
        return self._keys is not None

    @property
    def has_tenants(self) -> bool:
        """Whether requests may be of different tenants."""
        return self._keys is not None or self._tenant_header is not None

    def start(self, supervisor: Supervisor) -> None:
        """Begins to read the file of keys again when it changes."""
        if self._keys_file is not None:
            supervisor.start_task("API keys", self._keys_file.watch())

    def begin(self, headers: Mapping[str, str]) -> Callable[[], None]:
        """Admits the request of the current task, and sets its tenant; call what is returned once it has ended.

        Args:
            headers: or metadata, found by names in lower case.

        Raises:
            Unauthenticated: it has no key that is known, and needs one.
            RateLimited: its key has used up a limit.
            BadRequest: its tenant is too long or not UTF-8.
        """
        set_account(None)
        set_key_name("")
        set_tenant("")
        if self._keys is None:
            set_tenant(self._tenant_of(headers))
            return lambda: None
        account = self._keys.account_of(headers.get(_AUTHORIZATION))
        set_key_name(account.key.name)
        set_tenant(account.key.tenant or self._tenant_of(headers))
        set_account(account)
        return account.begin()

    def _tenant_of(self, headers: Mapping[str, str]) -> str:
        name = self._tenant_header
        tenant = (headers.get(name) if name is not None else None) or self._tenant
        # aiohttp has bytes that are no UTF-8 as surrogates.
        if len(tenant) > MAX_TENANT_LENGTH or any("\ud800" <= letter <= "\udfff" for letter in tenant):
            raise BadRequest(f"the tenant in {name} must be at most {MAX_TENANT_LENGTH} characters, in UTF-8")
        return tenant
