package store

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

// What a purge has to know is told without a key, also by a database of an older
// version, and nothing is changed by it.
func TestLook(t *testing.T) {
	h := newHarness(t)
	var want []Workspace
	for _, id := range []string{"a", "b"} {
		want = append(want, Workspace{ID: id, UID: h.create(id, value("K", "v")).UID})
	}
	instance, path := h.InstanceUID(), h.cfg.Path
	if _, _, err := Look(path); !errors.Is(err, ErrLocked) {
		t.Errorf("of a running daemon: %v", err)
	}
	// The oldest version has only this bucket in common with ours.
	for _, version := range []uint64{schemaVersion, 1} {
		h.edit(func(tx *bolt.Tx) error {
			if version == 1 {
				if err := tx.DeleteBucket(bucketRollouts); err != nil {
					return err
				}
			}
			return tx.Bucket(bucketMeta).Put(metaSchema, number(version))
		})
		if err := h.db.Close(); err != nil {
			t.Fatal(err)
		}
		before := must(os.ReadFile(path))(t)
		got, workspaces, err := Look(path)
		if err != nil || got != instance || !cmp.Equal(workspaces, want) {
			t.Errorf("schema %d: got %s, %v, %v, want %s, %v", version, got, workspaces, err, instance, want)
		}
		if !bytes.Equal(before, must(os.ReadFile(path))(t)) {
			t.Error("it changed something")
		}
		h.db = must(bolt.Open(path, 0o600, nil))(t)
	}
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Put(metaSchema, number(schemaVersion+1)) })
	if err := h.db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Look(path); !errors.Is(err, ErrSchema) {
		t.Errorf("of a newer version: %v", err)
	}
	if err := os.WriteFile(path, []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Look(path); !errors.Is(err, ErrDamaged) {
		t.Errorf("damaged: %v", err)
	}
}
