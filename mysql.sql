-- The ledger of saslquota, for MySQL 8 and MariaDB 10.6 or newer: one row for every accepted send.
--     mysql saslquota < mysql.sql
-- Rows are only ever appended, and purged when they are older than _retentiondays. Never DELETE
-- rows of an account by hand: docs/operation.md tells how to see the usage and to unblock a sender.

CREATE TABLE IF NOT EXISTS sends (
    account     VARCHAR(320) NOT NULL COMMENT 'the login, folded (docs/rules.md), or POOL and a pool''s key',
    seq         BIGINT       NOT NULL COMMENT '1, 2, 3 ... in each account',
    epoch       INT          NOT NULL COMMENT '1, until an administrator''s reset begins the next',
    at          DATETIME(6)  NOT NULL COMMENT 'UTC; never falls as seq rises in an epoch',
    recipients  INT          NOT NULL COMMENT 'what this send cost; 0 for a reset',
    total       BIGINT       NOT NULL COMMENT 'sum of recipients in this epoch, this row included',
    instance    VARCHAR(64)  NOT NULL COMMENT 'Postfix''s instance attribute',
    token       BIGINT       NOT NULL COMMENT 'one random number for each INSERT',
    PRIMARY KEY (account, seq),
    KEY sends_at (at)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
