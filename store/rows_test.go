package store

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

// A row that is garbage is found at the start, and named.
func TestContract23_DamagedRows(t *testing.T) {
	h := filled(t)
	h.create("gone")
	h.remove("gone")
	rows := dump(t, h.db)
	good := h.closeAndRead()

	garbage := []string{"", "x", "null", "{}", "[]", `"text"`, `{"id":7}`, `{"id":"another"}`, "12345678", strings.Repeat("{", 1000)}
	for bucket, some := range map[string][]string{
		"workspaces":         {"w03"},
		"feed":               {string(number(1))},
		"removed":            {lastKey(rows["removed"])},
		"secrets":            {globalOwner + "/"},
		"requests":           {"id"},
		"requests_by_expiry": {"short"},
		"meta":               {"schema"},
		"counters":           {"revision", "tombstones", "requests"},
	} {
		for _, key := range some {
			for i, value := range garbage {
				if rows[bucket][key] == value || bucket == "removed" && len(value) == 8 || (bucket == "meta" || bucket == "counters") && len(value) == 8 {
					continue // makes sense
				}
				t.Run(fmt.Sprintf("%s %q %d", bucket, key, i), func(t *testing.T) {
					cfg := h.cfg
					cfg.Path = filepath.Join(t.TempDir(), "workspaced.db")
					if err := os.WriteFile(cfg.Path, good, 0o600); err != nil {
						t.Fatal(err)
					}
					editFile(t, cfg.Path, func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Put([]byte(key), []byte(value)) })
					refused(t, cfg, ErrDamaged)
				})
			}
		}
	}
}

// A row that the disk has lost is missed, whoever it was.
func TestContract23_LostRows(t *testing.T) {
	h := filled(t)
	h.create("gone")
	h.remove("gone")
	must(h.UpdateSecrets(ctx, in("w03"), SecretsUpdate{Delete: []string{"L"}}, Options{}))(t)
	rows := dump(t, h.db)
	good := h.closeAndRead()
	for bucket := range rows {
		if len(rows[bucket]) == 0 {
			continue
		}
		for _, key := range []string{firstKey(rows[bucket]), lastKey(rows[bucket])} {
			if bucket == "meta" || bucket == "counters" && key != "tombstones" || bucket == "requests_by_expiry" {
				continue // not a list
			}
			t.Run(fmt.Sprintf("%s %q", bucket, key), func(t *testing.T) {
				cfg := h.cfg
				cfg.Path = filepath.Join(t.TempDir(), "workspaced.db")
				if err := os.WriteFile(cfg.Path, good, 0o600); err != nil {
					t.Fatal(err)
				}
				editFile(t, cfg.Path, func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Delete([]byte(key)) })
				refused(t, cfg, ErrDamaged)
			})
		}
	}
}

func firstKey(rows map[string]string) string { return slices.Sorted(maps.Keys(rows))[0] }

func lastKey(rows map[string]string) string {
	keys := slices.Sorted(maps.Keys(rows))
	return keys[len(keys)-1]
}

// editFile changes rows of a database that is closed.
func editFile(t *testing.T, path string, f func(*bolt.Tx) error) {
	t.Helper()
	db := must(bolt.Open(path, 0o600, nil))(t)
	if err := errors.Join(db.Update(f), db.Close()); err != nil {
		t.Fatal(err)
	}
}

// Garbage in a row that is found while running is an error that names bucket and
// key; nothing else is harmed.
func TestDamagedRow_WhileRunning(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("K", "1"))
	h.create("b", value("K", "2"))
	must(h.RestartWorkspace(ctx, "b", request("id", "one")))(t)
	put := func(bucket []byte, key, value string) {
		h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Put([]byte(key), []byte(value)) })
	}
	want := func(err error, bucket, key string) {
		t.Helper()
		var row *RowError
		if !errors.As(err, &row) || row.Bucket != bucket || row.Key != key || !errors.Is(err, ErrDamaged) {
			t.Errorf("got %v, want one that names %s in %s", err, key, bucket)
		}
	}
	good := dump(t, h.db)

	for _, garbage := range []string{"", "null", `{"id":"b","uid":"x","generation":1,"revision":1}`} {
		put(bucketWorkspaces, "a", garbage)
		_, err := h.Workspace("a")
		want(err, "workspaces", "a")
		_, err = h.Snapshot("a")
		want(err, "workspaces", "a")
		_, err = h.RestartWorkspace(ctx, "a", Options{})
		want(err, "workspaces", "a")
		_, _, err = h.ListWorkspaces("", 0, nil)
		want(err, "workspaces", "a")
		_, err = h.UpdateSecrets(ctx, Scope{}, set("G", "1"), Options{})
		want(err, "workspaces", "a")
		must(h.RestartWorkspace(ctx, "b", Options{}))(t)
	}
	put(bucketWorkspaces, "a", good["workspaces"]["a"])

	put(bucketFeed, string(number(1)), `{"id":"c"}`)
	_, err := h.Feed(0, 0)
	want(err, "feed", string(number(1)))
	put(bucketFeed, string(number(1)), good["feed"][string(number(1))])

	// A request that was remembered is in nobody's way, and goes.
	put(bucketRequests, "id", "{")
	_, err = h.RestartWorkspace(ctx, "b", request("id", "one"))
	want(err, "requests", "id")
	put(bucketRequestsByExpiry, "short", "")
	h.clock.Add(2 * requestAge)
	must(h.RestartWorkspace(ctx, "b", Options{}))(t)
	must(h.RestartWorkspace(ctx, "b", request("id", "two")))(t)
	if rows := dump(t, h.db); len(rows["requests"]) != 1 || len(rows["requests_by_expiry"]) != 1 {
		t.Errorf("%d requests, %d ends are left", len(rows["requests"]), len(rows["requests_by_expiry"]))
	}

	put(bucketCounters, "revision", "short")
	_, err = h.RestartWorkspace(ctx, "b", Options{})
	want(err, "counters", "revision")
	_, err = h.RestartWorkspace(ctx, "b", Options{ValidateOnly: true})
	want(err, "counters", "revision")
	put(bucketCounters, "revision", good["counters"]["revision"])
}

// A secret whose row is garbage is like one that can't be opened: it is named,
// nobody else's, and setting or deleting it heals it, after a restart as well.
func TestSecrets_DamagedRow(t *testing.T) {
	garbage := map[string]string{
		"none": "", "no JSON": "{", "null": "null", "nothing": "{}", "another kind": `{"version":"1"}`,
		"no version": `{"version":0,"size":1}`, "negative": `{"version":1,"size":-1}`,
	}
	heals := map[string]struct {
		do   func(h *harness, scope Scope) (Result, error)
		want map[string]string
	}{
		"set": {func(h *harness, scope Scope) (Result, error) {
			return h.UpdateSecrets(ctx, scope, set("K", "old"), Options{})
		}, map[string]string{"K": "old", "L": "2"}},
		"set another value": {func(h *harness, scope Scope) (Result, error) {
			return h.UpdateSecrets(ctx, scope, set("K", "longer than it was"), Options{})
		}, map[string]string{"K": "longer than it was", "L": "2"}},
		"delete": {func(h *harness, scope Scope) (Result, error) {
			return h.UpdateSecrets(ctx, scope, SecretsUpdate{Delete: []string{"K"}, MustExist: true}, Options{})
		}, map[string]string{"L": "2"}},
	}
	for _, scope := range []Scope{{}, in("a")} {
		for what, row := range garbage {
			for how, heal := range heals {
				for _, restart := range []bool{false, true} {
					t.Run(fmt.Sprint(scope, " ", what, ", ", how, ", ", restart), func(t *testing.T) {
						h := newHarness(t)
						o := ownerOf(ptr(h.create("a")))
						h.create("b", value("K", "own"), value("L", "own"))
						if scope.Global() {
							o = owner{}
						}
						must(h.UpdateSecrets(ctx, scope, set("K", "old", "L", "2"), Options{}))(t)
						h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketSecrets).Put(o.row("K"), []byte(row)) })
						if restart {
							h.reopen()
						}

						var key *KeyError
						if s, err := h.Snapshot("a"); !errors.As(err, &key) || key.Key != "K" || !errors.Is(err, ErrUnreadable) || len(s.Secrets) != 0 {
							t.Errorf("got %v, %v", s, err)
						}
						if _, err := h.Secret(scope, "K"); !errors.As(err, &key) || key.Key != "K" || !errors.Is(err, ErrUnreadable) {
							t.Errorf("got %v", err)
						}
						if diff := cmp.Diff(map[string]string{"K": "own", "L": "own"}, h.values("b")); diff != "" {
							t.Error(diff)
						}
						secrets, _, err := h.ListSecrets(scope, "", 0)
						if err != nil || len(secrets) != 2 || secrets[0].Key != "K" || secrets[0].Version != 0 || secrets[0].Size != 3 || secrets[1].Version != 1 {
							t.Errorf("the list is %+v, %v", secrets, err)
						}
						// Other keys of that owner can be set.
						must(h.UpdateSecrets(ctx, scope, set("L", "2+"), Options{}))(t)
						must(h.UpdateSecrets(ctx, scope, set("L", "2"), Options{}))(t)

						before := must(h.Workspace("a"))(t)
						r := must(heal.do(h, scope))(t)
						if after := must(h.Workspace("a"))(t); !r.Changed || after.Generation != before.Generation+1 {
							t.Errorf("got %+v, generation %d after %d", r, after.Generation, before.Generation)
						}
						if diff := cmp.Diff(heal.want, h.values("a")); diff != "" {
							t.Error(diff)
						}
						checkSums(t, h, o)
						// No version that it may have had is used again.
						again := must(h.UpdateSecrets(ctx, scope, set("K", "newer"), Options{}))(t)
						if v := again.Secrets[0].Version; v < h.clock.Now().Unix() {
							t.Errorf("version %d", v)
						}
						h.reopen()
						if h.values("a")["K"] != "newer" {
							t.Errorf("got %v", h.values("a"))
						}
					})
				}
			}
		}
	}
}

// A secret whose row is garbage is no obstacle to its workspace's end.
func TestSecrets_DamagedRowIsRemoved(t *testing.T) {
	h := newHarness(t)
	o := ownerOf(ptr(h.create("a", value("K", "1"), value("L", "2"))))
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketSecrets).Put(o.row("K"), []byte("x")) })
	h.remove("a")
	rows := dump(t, h.db)
	if n := len(rows["secrets"]) + len(rows["sealed"]); n != 0 {
		t.Errorf("%d rows are left", n)
	}
	h.reopen()
}

// A deleted key's row that is garbage is none of a container's business.
func TestSecrets_DamagedRowOfDeletedKey(t *testing.T) {
	h := newHarness(t)
	o := ownerOf(ptr(h.create("a", value("K", "1"), value("L", "2"))))
	must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"K"}}, Options{}))(t)
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketSecrets).Put(o.row("K"), []byte("x")) })
	h.reopen()
	if diff := cmp.Diff(map[string]string{"L": "2"}, h.values("a")); diff != "" {
		t.Error(diff)
	}
	r := must(h.UpdateSecrets(ctx, in("a"), set("K", "3"), Options{}))(t)
	if r.Secrets[0].Version < h.clock.Now().Unix() || h.values("a")["K"] != "3" {
		t.Errorf("got %+v", r)
	}
	checkSums(t, h, o)
}

// A secret that vanished while running is missed.
func TestContract18_MissingSecret(t *testing.T) {
	h := newHarness(t)
	o := ownerOf(ptr(h.create("a", value("K", "1"), value("L", "2"))))
	h.edit(func(tx *bolt.Tx) error {
		return errors.Join(tx.Bucket(bucketSecrets).Delete(o.row("L")), tx.Bucket(bucketSealed).Delete(o.value("L", 1)))
	})
	if s, err := h.Snapshot("a"); !errors.Is(err, ErrDamaged) || len(s.Secrets) != 0 {
		t.Errorf("got %+v, %v", s, err)
	}
}
