// Package store keeps workspaces and their secrets in one bbolt file.
//
// Every change is one transaction and durable before its method returns. Callers
// that come at the same time share one commit, see writer.go. What has changed
// is told to Config.OnCommit after the commit and before the callers get their
// answers, so that nobody has to be alive for a change to be noticed.
//
// # Schema
//
// Version 11. Numbers are 8 bytes big endian, records are JSON. Rows that one change
// writes lie together where they can: each page that a commit need not write makes it
// faster. So counters is small, and bbolt keeps it in the page of its root, which each
// commit writes.
//
//	meta
//	├── schema      number  version of this schema
//	├── instance    text    uuid of this database, made once
//	├── keys        record  storedWrapped: the data keys, wrapped by the KEK
//	├── compact     number  1: the file is to be compacted, see compact.go
//	├── check       bytes   the instance's uuid, sealed: tells a wrong key
//	└── audit_key   bytes   the key of the MAC in counters, sealed
//	counters
//	├── revision    number  last one given to a change of a workspace
//	├── floor       number  newest revision whose tombstone was pruned
//	├── tombstones  number  rows in removed
//	├── requests    record  how many rows and bytes are in requests
//	└── audit       record  auditState: where audit begins and ends, under a MAC
//	workspaces
//	└── ID                  record  Workspace, with the hashes of its containers' tokens
//	feed                    one row a workspace, and one a removed workspace
//	└── REVISION            record  feedRow: the workspace's id, or a tombstone
//	removed                 the tombstones in feed, oldest first
//	└── REVISION            number  when it was removed, Unix nanoseconds
//	secrets                 an OWNER is a workspace's uid, or "global"
//	├── OWNER/              bytes   sums over its secrets, and an index: a hash of each of
//	│                               the other rows, all of that under a seal, see index.go
//	└── OWNER/KEY           record  secretRecord: the current version and older ones; of
//	                                a deleted key the version
//	sealed
//	└── OWNER/KEY NUL VERSION
//	                        bytes   a version's value, sealed
//	requests
//	└── REQUEST ID          record  requestRecord: sealed fingerprint, result
//	requests_by_expiry
//	└── EXPIRY, REQUEST ID  empty   EXPIRY in Unix nanoseconds
//	rollouts                changes of global secrets that older records take in
//	└── REVISION            record  rollout: the keys, see rollout.go
//	audit                   who did what, see audit.go
//	└── SEQUENCE            32 bytes of hash, then a record  AuditEntry
//	tokens
//	└── ID                  record  Token: its SHA-256, and what it lets do
//
// # Sealing
//
// A value is sealed with scope, owner, key and version as associated data. The
// current version is that of the row in secrets, and no later one may be in sealed:
// ciphertext that was moved, swapped or put back from an earlier time does not
// open. Nor does one that was put back together with that row: the owner's own row
// tells. All that an owner has, put back together, or a database as a whole,
// is not recognized.
//
// All is sealed with data keys, which meta has, wrapped by Config.KEK. They can be
// rotated, see rotate.go.
//
// A deleted key's version stays, so that no version ever names two values. Its
// values go, all of them.
//
// # Change feed
//
// Each change of a workspace's record takes the next revision and moves the
// workspace's row in feed there. A reader that remembers the last revision it
// has seen gets exactly what is newer. Removed workspaces leave a tombstone; the
// oldest ones are pruned, and a reader that may have missed one gets
// ErrCompacted.
package store
