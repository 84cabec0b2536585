package store

import (
	"bytes"
	"fmt"

	bolt "go.etcd.io/bbolt"
)

// checkRows returns an error when a row can't be read, or when rows are missing
// that others speak of. Pages have no checksums: one that the disk has lost, or
// that is not the newest one which was written, would else go unnoticed.
//
// Rows of secrets are not read: a damaged one costs its workspace that secret,
// until it is set anew, and nobody else anything.
func checkRows(tx *bolt.Tx) error {
	revisions, uids := map[string]uint64{}, map[string]bool{globalOwner: true}
	err := tx.Bucket(bucketWorkspaces).ForEach(func(k, v []byte) error {
		var w Workspace
		err := decode(bucketWorkspaces, k, v, &w)
		revisions[w.ID], uids[w.UID] = w.Revision, true
		return err
	})
	if err == nil {
		err = checkFeed(tx, revisions)
	}
	if err == nil {
		err = checkSecrets(tx, uids)
	}
	if err == nil {
		err = checkRequests(tx)
	}
	return err
}

// checkFeed checks that the feed tells of exactly the workspaces that are there.
func checkFeed(tx *bolt.Tx, revisions map[string]uint64) error {
	newest, err := metaNumber(tx, metaRevision)
	if err != nil {
		return err
	}
	if _, err := metaNumber(tx, metaFloor); err != nil {
		return err
	}
	tombstones, err := metaNumber(tx, metaTombstones)
	if err != nil {
		return err
	}
	var removed uint64
	err = tx.Bucket(bucketFeed).ForEach(func(k, v []byte) error {
		n, err := parseNumber(bucketFeed, k, k)
		if err != nil {
			return err
		}
		var row feedRow
		if err := decode(bucketFeed, k, v, &row); err != nil {
			return err
		}
		switch {
		case n > newest:
			return fmt.Errorf("revision %d is newer than the newest", n)
		case !row.RemoveTime.IsZero():
			removed++
			_, err := parseRemoved(k, tx.Bucket(bucketRemoved).Get(k))
			return err
		case revisions[row.ID] != n:
			return fmt.Errorf("workspace %.64q is not of revision %d", row.ID, n)
		}
		delete(revisions, row.ID)
		return nil
	})
	if err != nil {
		return err
	}
	for id := range revisions {
		return fmt.Errorf("the feed does not know workspace %.64q", id)
	}
	if _, err := rolloutsOf(tx); err != nil {
		return err
	}
	if rows := count(tx, bucketRemoved); rows != removed || rows != tombstones {
		return fmt.Errorf("%d workspaces were removed, not %d", tombstones, max(rows, removed))
	}
	return nil
}

// checkSecrets checks that each owner is there and has as many rows as its sums
// say, and that each secret has a value and each value a secret.
func checkSecrets(tx *bolt.Tx, uids map[string]bool) error {
	// How many secrets there are and were, how many values, and how long the keys
	// of those are.
	type rows struct{ secrets, retired, sealed, keyBytes int }
	owners := map[string]*rows{}
	each := func(bucket []byte, f func(r *rows, row, key []byte)) error {
		return tx.Bucket(bucket).ForEach(func(k, _ []byte) error {
			name, key, ok := bytes.Cut(k, []byte("/"))
			if !ok {
				return &RowError{string(bucket), string(k)}
			}
			r := owners[string(name)]
			if r == nil {
				r = &rows{}
				owners[string(name)] = r
			}
			f(r, k, key)
			return nil
		})
	}
	sealed := tx.Bucket(bucketSealed)
	err := each(bucketSecrets, func(r *rows, row, _ []byte) {
		if sealed.Get(row) == nil {
			r.retired++
		} else {
			r.secrets++
		}
	})
	if err != nil {
		return err
	}
	err = each(bucketSealed, func(r *rows, _, key []byte) {
		r.sealed++
		r.keyBytes += len(key)
	})
	if err != nil {
		return err
	}
	err = tx.Bucket(bucketOwners).ForEach(func(k, v []byte) error {
		var sums ownerRecord
		if err := decode(bucketOwners, k, v, &sums); err != nil {
			return err
		}
		if !uids[string(k)] {
			return fmt.Errorf("there are secrets of %.64q, which is no workspace", k)
		}
		r := owners[string(k)]
		delete(owners, string(k))
		if r == nil {
			r = &rows{}
		}
		if r.keyBytes != sums.KeyBytes || r.secrets != r.sealed || r.retired != sums.Retired {
			return fmt.Errorf("secrets of %.64q are missing", k)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for name := range owners {
		return fmt.Errorf("there are secrets of %.64q, which is not known", name)
	}
	return nil
}

func checkRequests(tx *bolt.Tx) error {
	var sums requestSums
	if _, err := getRecord(tx, bucketMeta, metaRequests, &sums); err != nil {
		return err
	}
	err := tx.Bucket(bucketRequests).ForEach(func(k, v []byte) error {
		return decode(bucketRequests, k, v, &requestRecord{})
	})
	if err != nil {
		return err
	}
	err = tx.Bucket(bucketRequestsByExpiry).ForEach(func(k, _ []byte) error {
		_, _, err := parseExpiryKey(k)
		return err
	})
	if err != nil {
		return err
	}
	if rows := count(tx, bucketRequests); rows != uint64(sums.Count) {
		return fmt.Errorf("%d requests are remembered, not %d", sums.Count, rows)
	}
	return nil
}

// count returns how many rows a bucket has.
func count(tx *bolt.Tx, bucket []byte) (n uint64) {
	c := tx.Bucket(bucket).Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		n++
	}
	return n
}
