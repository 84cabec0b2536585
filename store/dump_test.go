package store

import (
	"fmt"
	"strings"

	bolt "go.etcd.io/bbolt"
)

// dump returns every row of the database, by bucket and key.
func dump(t testT, db *bolt.DB) map[string]map[string]string {
	t.Helper()
	rows := map[string]map[string]string{}
	err := db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			rows[string(name)] = map[string]string{}
			return b.ForEach(func(k, v []byte) error {
				if v == nil {
					return fmt.Errorf("%s has a bucket", name)
				}
				rows[string(name)][string(k)] = string(v)
				return nil
			})
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

// edit changes rows behind the store's back.
func (h *harness) edit(f func(*bolt.Tx) error) {
	h.t.Helper()
	if err := h.db.Update(f); err != nil {
		h.t.Fatal(err)
	}
}

func containsAny(s string, parts ...string) bool {
	for _, p := range parts {
		if strings.Contains(s, p) {
			return true
		}
	}
	return false
}
