package store

import (
	"errors"
	"fmt"

	"github.com/google/uuid"
	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// schemaVersion is the version that this program reads and writes.
const schemaVersion = 9

// auditVersion is the first version with an audit log, which a migration begins
// empty.
const auditVersion = 6

// migrations[i] brings a database of version i+1 to version i+2. They run in
// one transaction, in order, and are never changed once released.
var migrations = []func(*bolt.Tx) error{
	// 2: crash policies. Records of 1 mean what they meant; a program that knows
	// only 1 would start again what has to stay at its end.
	func(*bolt.Tx) error { return nil },
	// 3: rollouts.
	func(tx *bolt.Tx) error { _, err := tx.CreateBucket(bucketRollouts); return err },
	// 4: delivery of secrets. Records of 3 mean what they meant; a program that
	// knows only 3 would put files into the environment.
	func(*bolt.Tx) error { return nil },
	// 5: security profiles. Records of 4 mean the default. A program that knows only
	// 4 would give a container more than it is to have, and forget the profile.
	func(*bolt.Tx) error { return nil },
	// 6: the audit log. Its key needs the sealer: see Store.load.
	func(tx *bolt.Tx) error { _, err := tx.CreateBucket(bucketAudit); return err },
	// 7: tokens.
	func(tx *bolt.Tx) error { _, err := tx.CreateBucket(bucketTokens); return err },
	// 8: versions of secrets.
	nameValues,
	// 9: tokens of containers. Records of 8 mean what they meant; a program that
	// knows only 8 would forget the token of a container that goes on running.
	func(*bolt.Tx) error { return nil },
}

var (
	bucketMeta             = []byte("meta")
	bucketWorkspaces       = []byte("workspaces")
	bucketFeed             = []byte("feed")
	bucketRemoved          = []byte("removed")
	bucketOwners           = []byte("owners")
	bucketSecrets          = []byte("secrets")
	bucketSealed           = []byte("sealed")
	bucketRequests         = []byte("requests")
	bucketRequestsByExpiry = []byte("requests_by_expiry")
	bucketRollouts         = []byte("rollouts")
	bucketAudit            = []byte("audit")
	bucketTokens           = []byte("tokens")

	allBuckets = [][]byte{
		bucketMeta, bucketWorkspaces, bucketFeed, bucketRemoved, bucketOwners,
		bucketSecrets, bucketSealed, bucketRequests, bucketRequestsByExpiry, bucketRollouts,
		bucketAudit, bucketTokens,
	}

	metaSchema     = []byte("schema")
	metaInstance   = []byte("instance")
	metaCheck      = []byte("check")
	metaRevision   = []byte("revision")
	metaFloor      = []byte("floor")
	metaTombstones = []byte("tombstones")
	metaRequests   = []byte("requests")
	metaAudit      = []byte("audit")
	metaAuditKey   = []byte("audit_key")
)

// initialize writes the schema into a new database.
func initialize(tx *bolt.Tx, sealer *seal.Sealer) error {
	for _, name := range allBuckets {
		if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	instance := uuid.NewString()
	check, err := sealer.Seal([]byte(instance), checkAssociated())
	if err != nil {
		return err
	}
	meta := tx.Bucket(bucketMeta)
	return errors.Join(
		meta.Put(metaSchema, number(schemaVersion)),
		meta.Put(metaInstance, []byte(instance)),
		meta.Put(metaCheck, check),
		initAudit(tx, sealer, instance),
	)
}

// migrate brings the database to the version after the last of steps.
func migrate(tx *bolt.Tx, steps []func(*bolt.Tx) error) error {
	meta := tx.Bucket(bucketMeta)
	version, err := metaNumber(tx, metaSchema)
	if err != nil {
		return err
	}
	for v := version; v <= uint64(len(steps)); v++ {
		if err := steps[v-1](tx); err != nil {
			return fmt.Errorf("migration from version %d: %w", v, err)
		}
		if err := meta.Put(metaSchema, number(v+1)); err != nil {
			return err
		}
	}
	return nil
}

func checkAssociated() []byte { return seal.AssociatedData("workspaced key check") }
