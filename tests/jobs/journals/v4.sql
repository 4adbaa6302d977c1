-- A journal as version 4 of the schema left it; its key is bytes 0 to 31. Never edited.
PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE files (
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        file_index INTEGER NOT NULL,
        original_url TEXT NOT NULL,             -- up to the query
        original_url_secret BLOB,               -- sealed: the query and what follows
        url TEXT NOT NULL,
        url_secret BLOB,
        path TEXT NOT NULL,
        sha256 TEXT,
        pinned INTEGER NOT NULL CHECK (pinned IN (0, 1)),
        etag TEXT,
        last_modified TEXT,
        size INTEGER,
        part_directory TEXT,
        part_name TEXT,
        part_dir_device TEXT,                   -- decimal: devices and inodes have 64 bits without a sign, or more
        part_dir_inode TEXT,
        part_device TEXT,
        part_inode TEXT,
        part_uid INTEGER,
        boot_id TEXT,
        restarts INTEGER NOT NULL,
        transferred INTEGER NOT NULL CHECK (transferred IN (0, 1)),
        committed INTEGER NOT NULL CHECK (committed IN (0, 1)), wanted TEXT NOT NULL DEFAULT '[]', position INTEGER NOT NULL DEFAULT 0, validated INTEGER NOT NULL DEFAULT 0 CHECK (validated IN (0, 1)), owed INTEGER NOT NULL DEFAULT 0 CHECK (owed IN (0, 1)), part_maker TEXT, part_draft TEXT NOT NULL DEFAULT '', sha512 TEXT, blake3 TEXT, served_sha256 TEXT, served_sha512 TEXT, media_type TEXT, refetches INTEGER NOT NULL DEFAULT 0, wrong_digest TEXT,
        PRIMARY KEY (job_id, file_index)
    ) WITHOUT ROWID;
INSERT INTO "files" VALUES('00000000-0000-0000-0000-000000000001',0,'http://files.example/0',X'0162B102EBDFD2D4472F4CBB24968C080A82A4843B7AE429C43B7B6394CD95AB89FC20E9E7D4A9B275','http://files.example/0',X'01CA718A5526F8A1C40DFAEDF349E1CB25E577DE4B915234FFEC46ED43D8A14DAFF9B0EC6FE35934F6','/srv/in/0','abababababababababababababababababababababababababababababababab',1,'"v1"','Sun, 01 Mar 2026 00:00:00 GMT',1000,'/srv/in','.0.bits-part','64769','2','64769','18446744073709551613',1000,'boot-1',1,0,0,'[]',0,0,0,NULL,'',NULL,NULL,NULL,NULL,NULL,0,NULL);
INSERT INTO "files" VALUES('00000000-0000-0000-0000-000000000002',0,'http://h/p',NULL,'http://h/p',NULL,'/srv/in/0',NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,1,1,'[]',0,0,0,NULL,'',NULL,NULL,NULL,NULL,NULL,0,NULL);
CREATE TABLE grants (
        job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        target INTEGER NOT NULL,
        scheme INTEGER NOT NULL,
        user_name TEXT,
        password_secret BLOB,                   -- sealed
        origins TEXT,                           -- JSON array of [scheme, host, port]; NULL: bound at the first resume
        PRIMARY KEY (job_id, target, scheme)
    ) WITHOUT ROWID;
INSERT INTO "grants" VALUES('00000000-0000-0000-0000-000000000001',1,3,'DOM\alice',X'010C399D9CA522041234A3558EB98A81A4DE745288C73F7DCF419631C264B4BA4C23055B','[["http", "files.example", 80]]');
CREATE TABLE jobs (
        number INTEGER PRIMARY KEY,             -- order of creation
        id TEXT NOT NULL UNIQUE,
        display_name TEXT NOT NULL,
        owner_sid TEXT NOT NULL,
        owner_name TEXT NOT NULL,
        owner_local TEXT NOT NULL,
        owner_principal TEXT,
        owner_proof TEXT,
        owner_process INTEGER NOT NULL CHECK (owner_process IN (0, 1)),
        owner_elevated INTEGER NOT NULL CHECK (owner_elevated IN (0, 1)),
        created INTEGER NOT NULL,               -- times: microseconds since 1970, UTC
        modified INTEGER NOT NULL,
        completed INTEGER,
        priority INTEGER NOT NULL,
        state INTEGER NOT NULL,
        resumed INTEGER NOT NULL CHECK (resumed IN (0, 1)),
        helper_flags INTEGER NOT NULL,
        proxy_usage INTEGER NOT NULL,
        proxy_list TEXT NOT NULL,               -- JSON array of strings
        proxy_bypass TEXT NOT NULL,             -- JSON array of strings
        proxy_resolved INTEGER NOT NULL CHECK (proxy_resolved IN (0, 1)),
        minimum_retry_delay REAL NOT NULL,      -- durations: seconds
        no_progress_timeout REAL NOT NULL,
        maximum_download_time REAL NOT NULL,
        error_code INTEGER,                     -- NULL: no error, and then every other error column is NULL
        error_context INTEGER,
        error_message TEXT,
        error_transient INTEGER,
        error_job_id TEXT,
        error_url TEXT,
        error_path TEXT,
        error_identity TEXT,
        error_http_status INTEGER,
        error_advice TEXT,
        error_retry_after REAL,
        error_file INTEGER,
        error_count INTEGER NOT NULL,
        retry_number INTEGER NOT NULL,
        retry_at INTEGER,
        stalled REAL NOT NULL,
        active REAL NOT NULL
    , description TEXT NOT NULL DEFAULT '', http_method TEXT NOT NULL DEFAULT 'GET', custom_headers_secret BLOB, custom_headers_write_only INTEGER NOT NULL DEFAULT 0, custom_headers_origins TEXT, security_flags INTEGER NOT NULL DEFAULT 0, crl_source TEXT, validates_certificates INTEGER NOT NULL DEFAULT 0, maximum_download_size INTEGER, dynamic_content INTEGER NOT NULL DEFAULT 0 CHECK (dynamic_content IN (0, 1)), high_performance INTEGER NOT NULL DEFAULT 0 CHECK (high_performance IN (0, 1)), on_demand_mode INTEGER NOT NULL DEFAULT 0 CHECK (on_demand_mode IN (0, 1)), notify_flags INTEGER NOT NULL DEFAULT 3, notify_program TEXT, notify_parameters TEXT, notify_setter TEXT, minimum_notification_interval REAL NOT NULL DEFAULT 0.5, maximum_bandwidth REAL, own_download_time INTEGER NOT NULL DEFAULT 0 CHECK (own_download_time IN (0, 1)), cost_flags INTEGER NOT NULL DEFAULT 2147483903, owed INTEGER NOT NULL DEFAULT 0, turn INTEGER NOT NULL DEFAULT 0, gives_up_at INTEGER, files_at_once INTEGER NOT NULL DEFAULT 1, segments INTEGER NOT NULL DEFAULT 1, client_certificate TEXT, client_certificate_origins TEXT, owner_session TEXT);
INSERT INTO "jobs" VALUES(1,'00000000-0000-0000-0000-000000000001','nightly','uid:1000:alice@REALM','alice','uid:1000','alice@REALM','ab12',0,0,1772368215123456,1772368215123456,NULL,0,5,1,2,2,'["proxy.example:3128"]','[".example"]',0,600.0,1209600.0,7776000.0,2149122551,5,'busy',0,NULL,'http://h/',NULL,NULL,503,'',3.0,0,2,1,1772368215123456,4.5,60.25,'','GET',NULL,0,NULL,0,NULL,0,NULL,0,0,0,3,NULL,NULL,NULL,0.5,NULL,0,2147483903,0,0,NULL,1,1,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(2,'00000000-0000-0000-0000-000000000002','nightly','uid:1001','bob','uid:1001',NULL,NULL,1,1,1772368215123456,1772368215123456,NULL,2,3,0,0,1,'[]','[]',0,600.0,1209600.0,7776000.0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,0,NULL,0.0,0.0,'','GET',NULL,0,NULL,0,NULL,0,NULL,0,0,0,3,NULL,NULL,NULL,0.5,NULL,0,2147483903,0,0,NULL,1,1,NULL,NULL,'c2');
CREATE TABLE ranges (                       -- the ranges asked for, in order; none: the whole file
        job_id TEXT NOT NULL,
        file_index INTEGER NOT NULL,
        range_index INTEGER NOT NULL,
        start INTEGER NOT NULL,
        length INTEGER,                         -- NULL: to the end of the file
        PRIMARY KEY (job_id, file_index, range_index),
        FOREIGN KEY (job_id, file_index) REFERENCES files (job_id, file_index) ON DELETE CASCADE
    ) WITHOUT ROWID;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO "settings" VALUES('key_id','35cb6830599145058fae8528f1eb0ab5');
INSERT INTO "settings" VALUES('key_source','file');
CREATE TABLE slices (
        job_id TEXT NOT NULL,
        file_index INTEGER NOT NULL,
        slice_index INTEGER NOT NULL,
        start INTEGER NOT NULL,
        stop INTEGER,                           -- NULL: unknown
        durable INTEGER NOT NULL,
        PRIMARY KEY (job_id, file_index, slice_index),
        FOREIGN KEY (job_id, file_index) REFERENCES files (job_id, file_index) ON DELETE CASCADE
    ) WITHOUT ROWID;
INSERT INTO "slices" VALUES('00000000-0000-0000-0000-000000000001',0,0,0,500,100);
INSERT INTO "slices" VALUES('00000000-0000-0000-0000-000000000001',0,1,500,1000,600);
CREATE INDEX jobs_by_turn ON jobs (
        state, priority, turn, number, dynamic_content, owner_sid, owner_name, owner_proof, owner_process, owner_elevated);
CREATE INDEX jobs_by_last_turn ON jobs (turn) WHERE turn > 0;
CREATE INDEX jobs_by_owner ON jobs (owner_sid);
CREATE INDEX jobs_by_moment ON jobs (ifnull(retry_at, gives_up_at)) WHERE state = 5;
CREATE INDEX jobs_awaiting ON jobs (number) WHERE state = 5 AND retry_at IS NULL;
CREATE INDEX jobs_by_change ON jobs (owner_elevated, modified);
CREATE INDEX jobs_with_helper ON jobs (state) WHERE helper_flags <> 0;
CREATE INDEX files_by_path ON files (path);
CREATE INDEX jobs_owing ON jobs (number) WHERE owed <> 0 AND notify_program IS NOT NULL;
CREATE INDEX jobs_by_session ON jobs (owner_sid, owner_session) WHERE owner_session IS NOT NULL;
COMMIT;
PRAGMA application_id=1112101971;
PRAGMA user_version=4;
PRAGMA journal_mode = WAL;
