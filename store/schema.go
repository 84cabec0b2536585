package store

import (
	"errors"
	"fmt"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// schemaVersion is the version that this program reads and writes.
const schemaVersion = 11

// migrations[i] brings a database of version i+1 to version i+2. They run in
// one transaction, in order, and are never changed once released.
var migrations = []migration{
	// 2: crash policies. Records of 1 mean what they meant; a program that knows
	// only 1 would start again what has to stay at its end.
	func(*bolt.Tx, *seal.Sealer) error { return nil },
	// 3: rollouts.
	func(tx *bolt.Tx, _ *seal.Sealer) error { _, err := tx.CreateBucket(bucketRollouts); return err },
	// 4: delivery of secrets. Records of 3 mean what they meant; a program that
	// knows only 3 would put files into the environment.
	func(*bolt.Tx, *seal.Sealer) error { return nil },
	// 5: security profiles. Records of 4 mean the default. A program that knows only
	// 4 would give a container more than it is to have, and forget the profile.
	func(*bolt.Tx, *seal.Sealer) error { return nil },
	// 6: the audit log, which begins empty.
	func(tx *bolt.Tx, sealer *seal.Sealer) error {
		if _, err := tx.CreateBucket(bucketAudit); err != nil {
			return err
		}
		return initAudit(tx, sealer, string(tx.Bucket(bucketMeta).Get(metaInstance)), bucketMeta)
	},
	// 7: tokens.
	func(tx *bolt.Tx, _ *seal.Sealer) error { _, err := tx.CreateBucket(bucketTokens); return err },
	// 8: versions of secrets.
	nameValues,
	// 9: tokens of containers. Records of 8 mean what they meant; a program that
	// knows only 8 would forget the token of a container that goes on running.
	func(*bolt.Tx, *seal.Sealer) error { return nil },
	// 10: indexes, and data keys in meta, see keys.go.
	makeIndexes,
	// 11: what one change writes lies together, see moveRows.
	moveRows,
}

// migration changes the schema. What it seals is sealed with the newest data key.
type migration func(*bolt.Tx, *seal.Sealer) error

var (
	bucketMeta             = []byte("meta")
	bucketCounters         = []byte("counters")
	bucketWorkspaces       = []byte("workspaces")
	bucketFeed             = []byte("feed")
	bucketRemoved          = []byte("removed")
	bucketSecrets          = []byte("secrets")
	bucketSealed           = []byte("sealed")
	bucketRequests         = []byte("requests")
	bucketRequestsByExpiry = []byte("requests_by_expiry")
	bucketRollouts         = []byte("rollouts")
	bucketAudit            = []byte("audit")
	bucketTokens           = []byte("tokens")

	allBuckets = [][]byte{
		bucketMeta, bucketCounters, bucketWorkspaces, bucketFeed, bucketRemoved,
		bucketSecrets, bucketSealed, bucketRequests, bucketRequestsByExpiry, bucketRollouts,
		bucketAudit, bucketTokens,
	}

	metaSchema   = []byte("schema")
	metaInstance = []byte("instance")
	metaCheck    = []byte("check")
	metaAuditKey = []byte("audit_key")
	metaKeys     = []byte("keys")
	metaCompact  = []byte("compact")

	counterRevision   = []byte("revision")
	counterFloor      = []byte("floor")
	counterTombstones = []byte("tombstones")
	counterRequests   = []byte("requests")
	counterAudit      = []byte("audit")
)

// initialize writes the schema into a new database.
func initialize(tx *bolt.Tx, instance string, sealer *seal.Sealer, keys storedWrapped) error {
	for _, name := range allBuckets {
		if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	check, err := sealer.Seal([]byte(instance), checkAssociated())
	if err != nil {
		return err
	}
	meta := tx.Bucket(bucketMeta)
	return errors.Join(
		meta.Put(metaSchema, number(schemaVersion)),
		meta.Put(metaInstance, []byte(instance)),
		meta.Put(metaCheck, check),
		initAudit(tx, sealer, instance, bucketCounters),
		putKeys(tx, keys),
	)
}

// migrate brings the database to the version after the last of steps.
func migrate(tx *bolt.Tx, sealer *seal.Sealer, steps []migration) error {
	meta := tx.Bucket(bucketMeta)
	version, err := schemaOf(tx)
	if err != nil {
		return err
	}
	for v := version; v <= uint64(len(steps)); v++ {
		if err := steps[v-1](tx, sealer); err != nil {
			return fmt.Errorf("migration from version %d: %w", v, err)
		}
		if err := meta.Put(metaSchema, number(v+1)); err != nil {
			return err
		}
	}
	return nil
}

func checkAssociated() []byte { return seal.AssociatedData("workspaced key check") }
