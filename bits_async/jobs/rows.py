"""Records to rows and rows to records: what must not be read from a copy of the journal is sealed on the way in (T13).

What the key does not open is `Lost`: it stays in its row, sealed, until it is replaced.
"""

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from ..auth.policy import AuthScheme, AuthTarget
from ..errors import BitsError, ErrorContext, NotFound, StoreError, make_error, scrub, show_text
from ..files.records import PartRecord
from ..identity.tokens import HelperTokenFlags
from ..transport.digests import Digests
from ..transport.options import HttpOptions, SecurityFlags, headers_of_text, headers_text
from ..transport.proxies import ProxySettings, ProxyUsage
from ..transport.ranges import FileRange, Slice, Validator
from .columns import (
    EPOCH,
    MICROSECOND,
    Row,
    Values,
    certificate_in,
    certificate_out,
    column_value,
    join_url,
    maybe_int,
    maybe_text,
    maybe_time,
    origins_in,
    origins_out,
    row_of,
    split_url,
    text_out,
)
from .model import (
    Change,
    CostFlags,
    FileCommitted,
    FileRecord,
    FileWhole,
    GrantRecord,
    GrantRemoved,
    JobPriority,
    JobRecord,
    JobRemoved,
    JobState,
    NotifyCmdLine,
    NotifyFlags,
    OwnerKey,
    StoredJob,
)
from .secrets import Place, SecretBox


def _url_place(job_id: UUID, owner: str, index: int, column: str) -> Place:
    return Place(job_id, owner, f"files.{index}.{column}")


def _headers_place(job: JobRecord) -> Place:
    return Place(job.id, job.owner.sid, "jobs.custom_headers")


def _password_place(job_id: UUID, owner: str, target: AuthTarget, scheme: AuthScheme) -> Place:
    return Place(job_id, owner, "grants.password", target.name, scheme.name)


@dataclass(slots=True)
class Lost:
    """Sealed values that this key does not open: of files by (job, index, column), beside their readable part; of grants; of jobs."""

    urls: dict[tuple[UUID, int, str], tuple[str, bytes]] = field(default_factory=dict)
    grants: set[tuple[UUID, AuthTarget, AuthScheme]] = field(default_factory=set)
    headers: dict[UUID, bytes] = field(default_factory=dict)  # of jobs: custom headers

    def jobs(self) -> frozenset[UUID]:
        return frozenset((*(key[0] for key in (*self.urls, *self.grants)), *self.headers))

    def copy(self) -> "Lost":
        return Lost(dict(self.urls), set(self.grants), dict(self.headers))

    def add(self, more: "Lost") -> None:
        self.urls |= more.urls
        self.grants |= more.grants
        self.headers |= more.headers

    def forget(self, job_ids: Set[UUID]) -> None:
        self.urls = {key: value for key, value in self.urls.items() if key[0] not in job_ids}
        self.grants = {key for key in self.grants if key[0] not in job_ids}
        self.headers = {key: value for key, value in self.headers.items() if key not in job_ids}


@dataclass(slots=True)
class Batch:
    """The changes of one transaction: of each thing the last one."""

    removed: dict[UUID, None] = field(default_factory=dict)
    jobs: dict[UUID, JobRecord] = field(default_factory=dict)
    files: dict[tuple[UUID, int], FileRecord] = field(default_factory=dict)
    slices: dict[tuple[UUID, int], list[Values]] = field(default_factory=dict)  # of the files, as they were at the call
    whole: dict[tuple[UUID, int], FileRecord] = field(default_factory=dict)  # after the files
    committed: dict[tuple[UUID, int], None] = field(default_factory=dict)  # after the files
    grants: dict[tuple[UUID, AuthTarget, AuthScheme], GrantRecord | None] = field(default_factory=dict)  # None: removed

    def add(self, change: Change) -> None:
        match change:
            case JobRecord():
                self.jobs[change.id] = change
            case FileRecord():
                self.files[change.job_id, change.index] = change
                self.slices[change.job_id, change.index] = _slice_rows(change)
                self.whole.pop((change.job_id, change.index), None)
                self.committed.pop((change.job_id, change.index), None)
            case FileWhole():
                self.whole[change.file.job_id, change.file.index] = change.file
                self.slices[change.file.job_id, change.file.index] = _slice_rows(change.file)
            case FileCommitted():
                self.committed[change.job_id, change.index] = None
            case GrantRecord():
                self.grants[change.job_id, change.target, change.scheme] = change
            case GrantRemoved():
                self.grants[change.job_id, change.target, change.scheme] = None
            case JobRemoved():
                self._remove(change.job_id)

    def _remove(self, job_id: UUID) -> None:
        self.removed[job_id] = None
        self.jobs.pop(job_id, None)
        self.files = {key: value for key, value in self.files.items() if key[0] != job_id}
        self.whole = {key: value for key, value in self.whole.items() if key[0] != job_id}
        self.committed = {key: None for key in self.committed if key[0] != job_id}
        self.grants = {key: value for key, value in self.grants.items() if key[0] != job_id}

    def job_ids(self) -> list[UUID]:
        mentioned = (*self.jobs, *(key[0] for key in (*self.files, *self.whole, *self.committed)), *(key[0] for key in self.grants))
        return list(dict.fromkeys(mentioned))

    def owners(self, before: Mapping[UUID, str]) -> dict[UUID, str]:
        """The owners' sids as they are after the transaction, of the jobs that it mentions and that exist then."""
        kept = {job_id: sid for job_id, sid in before.items() if job_id not in self.removed}
        return kept | {job_id: job.owner.sid for job_id, job in self.jobs.items()}


@dataclass(slots=True)
class _Rows:
    jobs: list[Values]
    files: list[Values]
    ranges: list[Values]
    slices: list[Values]
    whole: list[Values]
    committed: list[Values]
    grants: list[Values]
    grants_removed: list[Values]


class Writer:
    """Turns records into rows; seals what must not be read. `lost` is what is lost once the transaction is committed."""

    def __init__(self, box: SecretBox, lost: Lost) -> None:
        self._box = box
        self.lost = lost.copy()

    def rows(self, batch: Batch, owners: Mapping[UUID, str]) -> _Rows:
        for job_id in batch.job_ids():
            needing = (*batch.files, *batch.whole, *batch.committed, *(k for k, v in batch.grants.items() if v))
            if job_id not in owners and any(key[0] == job_id for key in needing):
                raise NotFound(job_id=job_id)
        return _Rows(
            [_job_row(job) | self._headers_of(job) for job in batch.jobs.values()],
            [self._file_row(file, owners[file.job_id]) for file in batch.files.values()],
            [row for file in batch.files.values() for row in _range_rows(file)],
            [row for each in batch.files | batch.whole for row in batch.slices[each]],
            [_whole_row(file) for file in batch.whole.values()],
            [row_of(job_id=job_id, file_index=index) for job_id, index in batch.committed],
            [self._grant_row(grant, owners[grant.job_id]) for grant in batch.grants.values() if grant],
            [self._grant_removed(*key) for key, grant in batch.grants.items() if grant is None],
        )

    def moved_files(self, rows: Iterable[Row], old: str, new: str) -> list[Values]:
        return [
            {
                **{
                    f"{column}_secret": self._moved(
                        row[f"{column}_secret"],
                        _url_place(UUID(row["job_id"]), old, row["file_index"], column),
                        _url_place(UUID(row["job_id"]), new, row["file_index"], column),
                    )
                    for column in ("original_url", "url")
                },
                "job_id": row["job_id"],
                "file_index": row["file_index"],
            }
            for row in rows
        ]

    def moved_grants(self, rows: Iterable[Row], old: str, new: str) -> list[Values]:
        moved = []
        for row in rows:
            which = AuthTarget(row["target"]), AuthScheme(row["scheme"])
            before, after = (_password_place(UUID(row["job_id"]), owner, *which) for owner in (old, new))
            key = {name: row[name] for name in ("job_id", "target", "scheme")}
            moved.append({"password_secret": self._moved(row["password_secret"], before, after), **key})
        return moved

    def _moved(self, sealed: bytes | None, before: Place, after: Place) -> bytes | None:
        secret = None if sealed is None else self._box.open(sealed, before)
        return sealed if secret is None else self._box.seal(secret, after)

    def _headers_of(self, job: JobRecord) -> Values:
        headers = job.http.headers
        if headers is None:  # as load() gave them: what is sealed stays
            return {"custom_headers_secret": self.lost.headers.get(job.id)}
        self.lost.headers.pop(job.id, None)
        return {"custom_headers_secret": self._box.seal(headers_text(headers), _headers_place(job)) if headers else None}

    def _file_row(self, file: FileRecord, owner: str) -> Values:
        original_url, original_url_secret = self._url(file, owner, "original_url", file.original_url)
        url, url_secret = self._url(file, owner, "url", file.url)
        return row_of(
            job_id=file.job_id,
            file_index=file.index,
            original_url=original_url,
            original_url_secret=original_url_secret,
            url=url,
            url_secret=url_secret,
            path=file.path,
            sha256=file.digests.sha256,
            sha512=file.digests.sha512,
            blake3=file.digests.blake3,
            restarts=file.restarts,
            refetches=file.refetches,
            wrong_digest=file.wrong_digest,
            committed=file.committed,
            wanted=json.dumps([[each.initial_offset, each.length] for each in file.wanted]) if file.wanted else "[]",
            position=file.position,
            **_fetched(file),
        )

    def _url(self, file: FileRecord, owner: str, column: str, url: str) -> tuple[str, bytes | None]:
        key = file.job_id, file.index, column
        if key in self.lost.urls and self.lost.urls[key][0] == url:
            return self.lost.urls[key]  # the URL as load() gave it, without its query: what is sealed stays
        self.lost.urls.pop(key, None)
        base, secret = split_url(url)
        return base, self._box.seal(secret, _url_place(file.job_id, owner, file.index, column)) if secret else None

    def _grant_row(self, grant: GrantRecord, owner: str) -> Values:
        which = grant.job_id, grant.target, grant.scheme
        self.lost.grants.discard(which)
        place = _password_place(grant.job_id, owner, grant.target, grant.scheme)
        return row_of(
            job_id=grant.job_id,
            target=grant.target,
            scheme=grant.scheme,
            user_name=grant.user_name,
            password_secret=None if grant.password is None else self._box.seal(grant.password, place),
            origins=origins_in(grant.origins),
        )

    def _grant_removed(self, job_id: UUID, target: AuthTarget, scheme: AuthScheme) -> Values:
        self.lost.grants.discard((job_id, target, scheme))
        return row_of(job_id=job_id, target=target, scheme=scheme)


def _job_row(job: JobRecord) -> Values:
    owner, error = job.owner, job.error.fields() if job.error else {}
    return row_of(
        id=job.id,
        display_name=job.display_name,
        description=job.description,
        owner_sid=owner.sid,
        owner_name=owner.name,
        owner_local=owner.local,
        owner_principal=owner.principal,
        owner_proof=owner.proof,
        owner_process=owner.process,
        owner_elevated=owner.elevated,
        owner_session=owner.session,
        created=job.created,
        modified=job.modified,
        completed=job.completed,
        priority=job.priority,
        state=job.state,
        resumed=job.resumed,
        helper_flags=job.helper_flags,
        proxy_usage=job.proxy.usage,
        proxy_list=json.dumps(job.proxy.proxy_list),
        proxy_bypass=json.dumps(job.proxy.bypass),
        proxy_resolved=job.proxy.resolved,
        http_method=job.http.method,
        custom_headers_write_only=job.http.headers_write_only,
        custom_headers_origins=origins_in(job.http.header_origins),
        security_flags=job.http.flags,
        crl_source=job.http.crl_source,
        validates_certificates=job.http.validates_certificates,
        client_certificate=certificate_in(job.http.client_certificate),
        client_certificate_origins=origins_in(job.http.certificate_origins),
        minimum_retry_delay=float(job.minimum_retry_delay),
        no_progress_timeout=float(job.no_progress_timeout),
        maximum_download_time=float(job.maximum_download_time),
        maximum_bandwidth=job.maximum_bandwidth,
        own_download_time=job.own_download_time,
        cost_flags=job.cost_flags,
        maximum_download_size=job.maximum_download_size,
        dynamic_content=job.dynamic_content,
        high_performance=job.high_performance,
        on_demand_mode=job.on_demand_mode,
        files_at_once=job.files_at_once,
        segments=job.segments,
        **{f"error_{name}": error.get(name) for name in _ERROR_FIELDS},
        error_file=job.error_file,
        error_count=job.error_count,
        retry_number=job.retry_number,
        retry_at=job.retry_at,
        stalled=float(job.stalled),
        active=float(job.active),
        notify_flags=job.notify_flags,
        notify_program=job.notify_cmd_line and job.notify_cmd_line.program,
        notify_parameters=job.notify_cmd_line and json.dumps(job.notify_cmd_line.parameters),
        notify_setter=job.notify_setter and json.dumps(asdict(job.notify_setter)),
        minimum_notification_interval=float(job.minimum_notification_interval),
        owed=job.owed,
        gives_up_at=job.gives_up_at,
        turn=job.turn,
    )


_ERROR_FIELDS: Final = tuple(BitsError().fields())


def _fetched(file: FileRecord) -> Values:
    """The columns that tell what was fetched, and where it is."""
    validator, part = file.validator, file.part
    return {
        "pinned": validator is not None,
        "etag": validator and validator.etag,
        "last_modified": validator and validator.last_modified,
        "size": validator and validator.size,
        "served_sha256": validator and validator.digests.sha256,
        "served_sha512": validator and validator.digests.sha512,
        "media_type": validator and validator.media_type,
        "part_directory": part and part.directory,
        "part_name": part and part.name,
        "part_dir_device": part and str(part.dir_device),
        "part_dir_inode": part and str(part.dir_inode),
        "part_device": part and str(part.device),
        "part_inode": part and str(part.inode),
        "part_uid": part and part.uid,
        "part_maker": part and part.maker,
        "part_draft": file.draft,
        "boot_id": file.boot_id,
        "transferred": file.transferred,
        "validated": file.validated,
        "owed": file.owed,
    }


def _whole_row(file: FileRecord) -> Values:
    return row_of(**_fetched(file), job_id=file.job_id, file_index=file.index)


def _range_rows(file: FileRecord) -> list[Values]:
    return [
        row_of(job_id=file.job_id, file_index=file.index, range_index=number, start=each.initial_offset, length=each.length)
        for number, each in enumerate(file.ranges)
    ]


def _slice_rows(file: FileRecord) -> list[Values]:
    job = column_value(file.job_id)
    return [
        row_of(job_id=job, file_index=file.index, slice_index=number, start=piece.start, stop=piece.end, durable=piece.durable)
        for number, piece in enumerate(file.slices)
    ]


class Reader:
    """Turns rows into records; collects in `lost` what the key does not open."""

    def __init__(self, box: SecretBox, path: Path) -> None:
        self._box = box
        self._path = path
        self.lost = Lost()

    def jobs(
        self, jobs: Iterable[Row], files: Iterable[Row], ranges: Iterable[Row], slices: Iterable[Row], grants: Iterable[Row]
    ) -> list[StoredJob]:
        files_of, grants_of = _by(files, "job_id"), _by(grants, "job_id")
        ranges_of, slices_of = _by(ranges, "job_id", "file_index"), _by(slices, "job_id", "file_index")
        return [self._job(row, files_of, ranges_of, slices_of, grants_of) for row in jobs]

    def _job(self, row: Row, files_of: "_Groups", ranges_of: "_Groups", slices_of: "_Groups", grants_of: "_Groups") -> StoredJob:
        name = row["id"]
        try:
            job = self._with_headers(row, _job(row))
            files = [
                self._file(file, job, ranges_of.get((name, file["file_index"]), ()), slices_of.get((name, file["file_index"]), ()))
                for file in files_of.get((name,), ())
            ]
            grants = [self._grant(grant, job) for grant in grants_of.get((name,), ())]
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as exc:
            raise StoreError(f"the journal's record of job {show_text(str(name), 40)} is damaged", path=self._path) from scrub(exc)
        return StoredJob(job, tuple(files), tuple(grant for grant in grants if grant))

    def _with_headers(self, row: Row, job: JobRecord) -> JobRecord:
        sealed = row["custom_headers_secret"]
        if sealed is None:
            return job
        text = self._box.open(sealed, _headers_place(job))
        if text is None:
            self.lost.headers[job.id] = sealed
        return replace(job, http=replace(job.http, headers=None if text is None else headers_of_text(text)))

    def _file(self, row: Row, job: JobRecord, ranges: Iterable[Row], slices: Iterable[Row]) -> FileRecord:
        return FileRecord(
            job_id=job.id,
            index=row["file_index"],
            original_url=self._url(row, job, "original_url"),
            url=self._url(row, job, "url"),
            path=Path(text_out(row["path"])),
            digests=Digests(row["sha256"], row["sha512"], row["blake3"]),
            ranges=tuple(FileRange(int(each["start"]), maybe_int(each["length"])) for each in ranges),
            validator=_validator(row),
            part=_part(row),
            draft=text_out(row["part_draft"]),
            slices=tuple(_slice(piece) for piece in slices),
            boot_id=row["boot_id"],
            restarts=row["restarts"],
            refetches=row["refetches"],
            wrong_digest=row["wrong_digest"],
            transferred=bool(row["transferred"]),
            committed=bool(row["committed"]),
            validated=bool(row["validated"]),
            wanted=tuple(FileRange(start, length) for start, length in json.loads(row["wanted"])),
            position=int(row["position"]),
            owed=bool(row["owed"]),
        )

    def _url(self, row: Row, job: JobRecord, column: str) -> str:
        base, sealed = text_out(row[column]), row[f"{column}_secret"]
        if sealed is None:
            return base
        secret = self._box.open(sealed, _url_place(job.id, job.owner.sid, row["file_index"], column))
        if secret is None:
            self.lost.urls[job.id, row["file_index"], column] = base, sealed
            return base
        return join_url(base, secret)

    def _grant(self, row: Row, job: JobRecord) -> GrantRecord | None:
        target, scheme, sealed = AuthTarget(row["target"]), AuthScheme(row["scheme"]), row["password_secret"]
        password = sealed and self._box.open(sealed, _password_place(job.id, job.owner.sid, target, scheme))
        if sealed is not None and password is None:
            self.lost.grants.add((job.id, target, scheme))
            return None
        return GrantRecord(
            job_id=job.id,
            target=target,
            scheme=scheme,
            user_name=maybe_text(row["user_name"]),
            password=password,
            origins=origins_out(row["origins"]),
        )


_Groups = dict[tuple[Any, ...], list[Row]]


def _by(rows: Iterable[Row], *columns: str) -> _Groups:
    groups: _Groups = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def _owner(row: Row) -> OwnerKey:
    return OwnerKey(
        sid=text_out(row["owner_sid"]),
        name=text_out(row["owner_name"]),
        local=text_out(row["owner_local"]),
        principal=maybe_text(row["owner_principal"]),
        proof=maybe_text(row["owner_proof"]),
        process=bool(row["owner_process"]),
        elevated=bool(row["owner_elevated"]),
        session=maybe_text(row["owner_session"]),
    )


def _proxy(row: Row) -> ProxySettings:
    return ProxySettings(
        ProxyUsage(row["proxy_usage"]),
        tuple(json.loads(row["proxy_list"])),
        tuple(json.loads(row["proxy_bypass"])),
        bool(row["proxy_resolved"]),
    )


def _http(row: Row) -> HttpOptions:
    return HttpOptions(
        method=text_out(row["http_method"]),
        headers_write_only=bool(row["custom_headers_write_only"]),
        header_origins=origins_out(row["custom_headers_origins"]),
        flags=SecurityFlags(row["security_flags"]),
        crl_source=None if row["crl_source"] is None else Path(text_out(row["crl_source"])),
        validates_certificates=bool(row["validates_certificates"]),
        client_certificate=certificate_out(row["client_certificate"]),
        certificate_origins=origins_out(row["client_certificate_origins"]),
    )


def _job(row: Row) -> JobRecord:
    return JobRecord(
        id=UUID(row["id"]),
        display_name=text_out(row["display_name"]),
        description=text_out(row["description"]),
        owner=_owner(row),
        created=EPOCH + row["created"] * MICROSECOND,
        modified=EPOCH + row["modified"] * MICROSECOND,
        completed=maybe_time(row["completed"]),
        priority=JobPriority(row["priority"]),
        state=JobState(row["state"]),
        resumed=bool(row["resumed"]),
        helper_flags=HelperTokenFlags(row["helper_flags"]),
        proxy=_proxy(row),
        http=_http(row),
        minimum_retry_delay=row["minimum_retry_delay"],
        no_progress_timeout=row["no_progress_timeout"],
        maximum_download_time=row["maximum_download_time"],
        maximum_bandwidth=row["maximum_bandwidth"],
        own_download_time=bool(row["own_download_time"]),
        cost_flags=CostFlags(row["cost_flags"]),
        maximum_download_size=maybe_int(row["maximum_download_size"]),
        dynamic_content=bool(row["dynamic_content"]),
        high_performance=bool(row["high_performance"]),
        on_demand_mode=bool(row["on_demand_mode"]),
        files_at_once=row["files_at_once"],
        segments=row["segments"],
        error=_error(row),
        error_file=row["error_file"],
        error_count=row["error_count"],
        retry_number=row["retry_number"],
        retry_at=maybe_time(row["retry_at"]),
        stalled=row["stalled"],
        active=row["active"],
        notify_flags=NotifyFlags(row["notify_flags"]),
        notify_cmd_line=_command(row),
        notify_setter=None if row["notify_setter"] is None else OwnerKey(**json.loads(row["notify_setter"])),
        minimum_notification_interval=row["minimum_notification_interval"],
        owed=NotifyFlags(row["owed"]),
        gives_up_at=maybe_time(row["gives_up_at"]),
        turn=row["turn"],
    )


def _command(row: Row) -> NotifyCmdLine | None:
    if row["notify_program"] is None:
        return None
    return NotifyCmdLine(text_out(row["notify_program"]), tuple(json.loads(row["notify_parameters"])))


def _error(row: Row) -> BitsError | None:
    """The error as it was stored: its class follows from code and context, as when it was made."""
    if row["error_code"] is None:
        return None
    return make_error(
        row["error_code"],
        ErrorContext(row["error_context"]),
        text_out(row["error_message"]),
        transient=bool(row["error_transient"]),
        job_id=UUID(row["error_job_id"]) if row["error_job_id"] else None,
        url=maybe_text(row["error_url"]),
        path=maybe_text(row["error_path"]),
        identity=maybe_text(row["error_identity"]),
        http_status=row["error_http_status"],
        advice=maybe_text(row["error_advice"]),
        retry_after=row["error_retry_after"],
    )


def _validator(row: Row) -> Validator | None:
    if not row["pinned"]:
        return None
    digests = Digests(row["served_sha256"], row["served_sha512"])
    return Validator(
        maybe_text(row["etag"]), maybe_text(row["last_modified"]), maybe_int(row["size"]), digests, maybe_text(row["media_type"])
    )


def _slice(row: Row) -> Slice:
    durable = int(row["durable"])
    return Slice(int(row["start"]), maybe_int(row["stop"]), written=durable, durable=durable)


def _part(row: Row) -> PartRecord | None:
    if row["part_name"] is None:
        return None
    return PartRecord(
        directory=text_out(row["part_directory"]),
        name=text_out(row["part_name"]),
        dir_device=int(row["part_dir_device"]),
        dir_inode=int(row["part_dir_inode"]),
        device=int(row["part_device"]),
        inode=int(row["part_inode"]),
        uid=maybe_int(row["part_uid"]),
        maker=maybe_text(row["part_maker"]),
    )
