package store

import (
	"bytes"
	"cmp"
	"fmt"
	"strings"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// checkRows returns an error when a row can't be read, or when rows are missing
// that others speak of. Pages have no checksums: one that the disk has lost, or
// that is not the newest one which was written, would else go unnoticed.
//
// Rows of secrets are not read: a damaged one costs its workspace that secret,
// until it is set anew, and nobody else anything. So does one of several values of
// a key that is missing, if it is the current one.
//
// Some of it is done at the same time, in a transaction that beside begins.
func checkRows(tx *bolt.Tx, sealer *seal.Sealer, beside func(func(*bolt.Tx) error) (wait func() error)) error {
	var secrets map[string]*secretRows
	counted := beside(func(tx *bolt.Tx) (err error) {
		secrets, err = countSecrets(tx, sealer)
		return err
	})
	var uids map[string]bool
	err := guard(func() (err error) { // also after a panic the other one is waited for
		uids, err = checkWorkspaces(tx)
		return err
	})
	err = cmp.Or(err, counted())
	if err == nil {
		err = checkOwners(uids, secrets)
	}
	if err == nil {
		err = checkRequests(tx)
	}
	if err == nil {
		_, err = tokensOf(tx)
	}
	return err
}

// inTurn is a beside for checkRows that does it all in one transaction.
func inTurn(tx *bolt.Tx) func(func(*bolt.Tx) error) (wait func() error) {
	return func(f func(*bolt.Tx) error) func() error { return func() error { return f(tx) } }
}

// checkWorkspaces checks the workspaces and that the feed knows them. It returns
// whose secrets there may be.
func checkWorkspaces(tx *bolt.Tx) (uids map[string]bool, err error) {
	revisions, uids := map[string]uint64{}, map[string]bool{globalOwner: true}
	var w Workspace
	err = tx.Bucket(bucketWorkspaces).ForEach(func(k, v []byte) error {
		w = Workspace{}
		err := decode(bucketWorkspaces, k, v, &w)
		// Copies: what is decoded keeps all of its row in memory.
		revisions[string(k)], uids[strings.Clone(w.UID)] = w.Revision, true
		return err
	})
	if err == nil {
		err = checkFeed(tx, revisions)
	}
	return uids, err
}

// checkFeed checks that the feed tells of exactly the workspaces that are there.
func checkFeed(tx *bolt.Tx, revisions map[string]uint64) error {
	newest, err := counter(tx, counterRevision)
	if err != nil {
		return err
	}
	if _, err := counter(tx, counterFloor); err != nil {
		return err
	}
	tombstones, err := counter(tx, counterTombstones)
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

// secretRows is what there is of an owner: how many secrets there are and were,
// how many keys have values, and how long those are. sums is what its own row says
// of that; nil: there is none.
type secretRows struct {
	secrets, retired, keys, keyBytes int
	sums                             *sums
}

// countSecrets counts the rows of each owner, and checks that sums and index in its
// own row are those that were written together.
func countSecrets(tx *bolt.Tx, sealer *seal.Sealer) (map[string]*secretRows, error) {
	owners := map[string]*secretRows{}
	of := func(bucket, row []byte) (r *secretRows, key []byte, err error) {
		name, key, ok := bytes.Cut(row, []byte("/"))
		if !ok {
			return nil, nil, &RowError{string(bucket), string(row)}
		}
		if r = owners[string(name)]; r == nil {
			r = &secretRows{}
			owners[string(name)] = r
		}
		return r, key, nil
	}
	var last []byte // the row in secrets that the value before belongs to
	err := tx.Bucket(bucketSealed).ForEach(func(k, _ []byte) error {
		row, _, err := parseValue(k)
		if err != nil {
			return err
		}
		if bytes.Equal(row, last) {
			return nil
		}
		r, key, err := of(bucketSealed, row)
		if err != nil {
			return err
		}
		r.keys++
		r.keyBytes += len(key)
		last = row
		return nil
	})
	if err != nil {
		return nil, err
	}
	values := tx.Bucket(bucketSealed).Cursor() // goes along: both are in order
	value, _ := values.First()
	err = tx.Bucket(bucketSecrets).ForEach(func(row, v []byte) error {
		r, key, err := of(bucketSecrets, row)
		if err != nil {
			return err
		}
		if len(key) == 0 {
			name, _ := ownRow(row)
			sums, _, err := openOwnerRow(sealer, name, v)
			r.sums = &sums
			return err
		}
		prefix := valuesOf(row)
		for value != nil && bytes.Compare(value, prefix) < 0 {
			value, _ = values.Next()
		}
		if bytes.HasPrefix(value, prefix) {
			r.secrets++
		} else {
			r.retired++
		}
		return nil
	})
	return owners, err
}

// checkOwners checks that each owner is there and has as many rows as its sums
// say, and that each secret has a value and each value a secret.
func checkOwners(uids map[string]bool, owners map[string]*secretRows) error {
	for name, r := range owners {
		switch {
		case r.sums == nil:
			return fmt.Errorf("there are secrets of %.64q, which is not known", name)
		case !uids[name]:
			return fmt.Errorf("there are secrets of %.64q, which is no workspace", name)
		case r.keyBytes != r.sums.keyBytes || r.secrets != r.keys || r.retired != r.sums.retired:
			return fmt.Errorf("secrets of %.64q are missing", name)
		}
	}
	return nil
}

func checkRequests(tx *bolt.Tx) error {
	var sums requestSums
	if _, err := getRecord(tx, bucketCounters, counterRequests, &sums); err != nil {
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
