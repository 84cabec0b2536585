package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// Until version 11 an owner's sums were a record in owners, its index was in indexes
// behind a seal over both, and the counters were in meta. One change of a secret wrote
// three to five pages more than it does with those rows beside others that it writes.

var (
	oldOwners  = []byte("owners")
	oldIndexes = []byte("indexes")
)

type oldSums struct {
	Bytes       int   `json:"bytes,omitempty"`
	KeyBytes    int   `json:"keyBytes,omitempty"`
	Retired     int   `json:"retired,omitempty"`
	LastVersion int64 `json:"lastVersion,omitempty"`
}

func oldAssociated(owner, sums []byte, x index) []byte {
	return seal.AssociatedData("workspaced index", string(owner), string(sums), string(x))
}

// makeIndexes is the migration to version 10.
func makeIndexes(tx *bolt.Tx, sealer *seal.Sealer) error {
	indexes, err := tx.CreateBucket(oldIndexes)
	if err != nil {
		return err
	}
	rows := map[string]index{}
	err = tx.Bucket(bucketSecrets).ForEach(func(k, v []byte) error {
		name, _, ok := bytes.Cut(k, []byte("/"))
		if !ok {
			return &RowError{string(bucketSecrets), string(k)}
		}
		x := rows[string(name)]
		x.put(k, v)
		rows[string(name)] = x
		return nil
	})
	if err != nil {
		return err
	}
	return tx.Bucket(oldOwners).ForEach(func(name, sums []byte) error {
		x := rows[string(name)]
		row, err := sealer.Seal(nil, oldAssociated(name, sums, x))
		return errors.Join(err, indexes.Put(name, append(row, x...)))
	})
}

// moveRows is the migration to version 11.
func moveRows(tx *bolt.Tx, sealer *seal.Sealer) error {
	counters, err := tx.CreateBucket(bucketCounters)
	if err != nil {
		return err
	}
	meta := tx.Bucket(bucketMeta)
	for _, key := range [][]byte{counterRevision, counterFloor, counterTombstones, counterRequests, counterAudit} {
		if v := slices.Clone(meta.Get(key)); v != nil {
			if err := errors.Join(counters.Put(key, v), meta.Delete(key)); err != nil {
				return err
			}
		}
	}
	owners, indexes, secrets := tx.Bucket(oldOwners), tx.Bucket(oldIndexes), tx.Bucket(bucketSecrets)
	if owners == nil || indexes == nil || secrets == nil {
		return damagedRows("rows of owners of secrets are missing")
	}
	moved := uint64(0)
	err = owners.ForEach(func(name, v []byte) error {
		damaged := &RowError{string(oldOwners), string(name)}
		row := indexes.Get(name)
		if len(row) < sealBytes || (len(row)-sealBytes)%entryBytes != 0 {
			return damaged
		}
		x := index(row[sealBytes:])
		if _, err := sealer.Open(row[:sealBytes], oldAssociated(name, v, x)); err != nil {
			return damaged
		}
		var old oldSums
		if json.Unmarshal(v, &old) != nil {
			return damaged
		}
		own, err := sealOwner(sealer, name, &sums{old.Bytes, old.KeyBytes, old.Retired, old.LastVersion}, x)
		if err != nil {
			return err
		}
		moved++
		return secrets.Put(append(slices.Clone(name), '/'), own)
	})
	if err != nil {
		return err
	}
	if count(tx, oldIndexes) != moved {
		return damagedRows("there are indexes of no owner")
	}
	return errors.Join(tx.DeleteBucket(oldOwners), tx.DeleteBucket(oldIndexes))
}
