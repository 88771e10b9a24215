-- The tables of saslquota, for MySQL 8 and MariaDB 10.6 or newer.
--     mysql saslquota < mysql.sql

-- The ledger: one row for every accepted send. Rows are only ever appended, and purged when they are
-- older than _retentiondays. Never DELETE rows of an account by hand: saslquotactl.py shows the usage
-- and unblocks a sender (docs/operation.md).

CREATE TABLE IF NOT EXISTS sends (
    account     VARCHAR(320) NOT NULL COMMENT 'the login, folded (docs/rules.md); POOL and a pool''s key; SPOOL: of no sender (docs/operation.md)',
    seq         BIGINT       NOT NULL COMMENT '1, 2, 3 ... in each account',
    epoch       INT          NOT NULL COMMENT '1, until an administrator''s reset begins the next',
    at          DATETIME(6)  NOT NULL COMMENT 'UTC; never falls as seq rises in an epoch',
    recipients  INT          NOT NULL COMMENT 'what this send cost; 0 for a reset',
    total       BIGINT       NOT NULL COMMENT 'sum of recipients in this epoch, this row included',
    instance    VARCHAR(64)  NOT NULL COMMENT 'Postfix''s instance attribute',
    token       BIGINT       NOT NULL COMMENT 'one random number for each INSERT',
    client_address VARBINARY(16) NOT NULL DEFAULT '' COMMENT 'see INET6_NTOA(); empty: not known',
    sender      VARCHAR(320) NOT NULL DEFAULT '' COMMENT 'of the envelope; empty when it is the login',
    PRIMARY KEY (account, seq),
    KEY sends_at (at)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;

-- What administrators have done: saslquotactl.py writes it. The newest grant, block or unblock of an
-- account is its order, which the daemons obey within a second.
CREATE TABLE IF NOT EXISTS events (
    account VARCHAR(320) NOT NULL COMMENT 'as in sends',
    number  INT          NOT NULL COMMENT '1, 2, 3 ... in each account',
    at      DATETIME(6)  NOT NULL COMMENT 'UTC',
    kind    VARCHAR(16)  NOT NULL COMMENT 'reset, grant, block, unblock, refused',
    until   DATETIME(6)  NULL     COMMENT 'UTC, of a grant or block; NULL: for good',
    amount  BIGINT       NULL     COMMENT 'of a grant: how many more; of refused: how many so far',
    epoch   INT          NULL     COMMENT 'of a grant: the account''s when it was given',
    author  VARCHAR(64)  NOT NULL COMMENT 'who did it, or the machine that refused',
    note    VARCHAR(400) NOT NULL,
    last    DATETIME(6)  NULL     COMMENT 'of refused: the last one that amount counts',
    claimed DATETIME(6)  NULL     COMMENT 'of refused: since when somebody is telling it',
    told    DATETIME(6)  NULL     COMMENT 'of refused: when the mail was taken',
    PRIMARY KEY (account, number),
    KEY events_kind (kind, at)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
