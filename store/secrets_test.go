package store

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

// copyRow copies a row; with an empty source key it removes the target.
func copyRow(tx *bolt.Tx, bucket, from, to []byte) error {
	b := tx.Bucket(bucket)
	return b.Put(to, slices.Clone(b.Get(from)))
}

// Ciphertext that is not where it was sealed does not open, and the error names
// the key. Setting the secret heals it.
func TestContract16_SealedAndBoundToTheirPlace(t *testing.T) {
	var a, b owner // whose secrets K and L are
	global := owner{}
	move := func(from owner, fromKey string, to owner, toKey string) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error { return copyRow(tx, bucketSealed, from.value(fromKey, 1), to.value(toKey, 1)) }
	}
	moveAll := func(from owner, fromKey string, to owner, toKey string) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			return errors.Join(
				copyRow(tx, bucketSealed, from.value(fromKey, 1), to.value(toKey, 1)),
				copyRow(tx, bucketSecrets, from.row(fromKey), to.row(toKey)),
			)
		}
	}
	tests := []struct {
		name   string
		tamper func(h *harness) func(*bolt.Tx) error
		key    string
		scope  Scope
	}{
		{"moved to another key", func(*harness) func(*bolt.Tx) error { return move(a, "K", a, "L") }, "L", in("a")},
		{"moved to another key with its row", func(*harness) func(*bolt.Tx) error { return moveAll(a, "K", a, "L") }, "L", in("a")},
		{"moved to another workspace", func(*harness) func(*bolt.Tx) error { return move(b, "K", a, "K") }, "K", in("a")},
		{"moved to another workspace with its row", func(*harness) func(*bolt.Tx) error { return moveAll(b, "K", a, "K") }, "K", in("a")},
		{"moved from global", func(*harness) func(*bolt.Tx) error { return moveAll(global, "H", a, "H") }, "H", in("a")},
		{"moved to global", func(*harness) func(*bolt.Tx) error { return moveAll(a, "K", global, "G") }, "G", Scope{}},
		{"swapped", func(*harness) func(*bolt.Tx) error {
			return func(tx *bolt.Tx) error {
				sealed := tx.Bucket(bucketSealed)
				k, l := slices.Clone(sealed.Get(a.value("K", 1))), slices.Clone(sealed.Get(a.value("L", 1)))
				return errors.Join(sealed.Put(a.value("K", 1), l), sealed.Put(a.value("L", 1), k))
			}
		}, "", in("a")},
		{"rolled back", func(h *harness) func(*bolt.Tx) error {
			old := dump(h.t, h.db)["sealed"][string(a.value("K", 1))]
			must(h.UpdateSecrets(ctx, in("a"), set("K", "newer"), Options{}))(h.t)
			return func(tx *bolt.Tx) error { return tx.Bucket(bucketSealed).Put(a.value("K", 2), []byte(old)) }
		}, "K", in("a")},
		{"rolled back after a deletion", func(h *harness) func(*bolt.Tx) error {
			old := dump(h.t, h.db)["sealed"][string(a.value("K", 1))]
			must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"K"}}, Options{}))(h.t)
			must(h.UpdateSecrets(ctx, in("a"), set("K", "newer"), Options{}))(h.t)
			return func(tx *bolt.Tx) error { return tx.Bucket(bucketSealed).Put(a.value("K", 2), []byte(old)) }
		}, "K", in("a")},
		{"its row rolled back", func(h *harness) func(*bolt.Tx) error {
			old := dump(h.t, h.db)["secrets"][string(a.row("K"))]
			must(h.UpdateSecrets(ctx, in("a"), set("K", "newer"), Options{}))(h.t)
			return func(tx *bolt.Tx) error { return tx.Bucket(bucketSecrets).Put(a.row("K"), []byte(old)) }
		}, "K", in("a")},
		{"an older version in place of the current one", func(h *harness) func(*bolt.Tx) error {
			must(h.UpdateSecrets(ctx, in("a"), set("K", "newer"), Options{}))(h.t)
			return func(tx *bolt.Tx) error { return copyRow(tx, bucketSealed, a.value("K", 1), a.value("K", 2)) }
		}, "K", in("a")},
		{"another version", func(*harness) func(*bolt.Tx) error {
			return func(tx *bolt.Tx) error {
				row := strings.Replace(string(tx.Bucket(bucketSecrets).Get(a.row("K"))), `"version":1`, `"version":2`, 1)
				return tx.Bucket(bucketSecrets).Put(a.row("K"), []byte(row))
			}
		}, "K", in("a")},
		{"a bit changed", func(*harness) func(*bolt.Tx) error {
			return func(tx *bolt.Tx) error {
				row := slices.Clone(tx.Bucket(bucketSealed).Get(a.value("K", 1)))
				row[len(row)-1] ^= 1
				return tx.Bucket(bucketSealed).Put(a.value("K", 1), row)
			}
		}, "K", in("a")},
		{"removed", func(*harness) func(*bolt.Tx) error {
			return func(tx *bolt.Tx) error { return tx.Bucket(bucketSealed).Delete(a.value("K", 1)) }
		}, "K", in("a")},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHarness(t)
			a = ownerOf(ptr(h.create("a", value("K", "1"), value("L", "2"), value("H", "5"))))
			b = ownerOf(ptr(h.create("b", value("K", "3"))))
			must(h.UpdateSecrets(ctx, Scope{}, set("G", "4", "H", "6"), Options{}))(t)
			before := h.values("b")
			h.edit(test.tamper(h))

			_, err := h.Snapshot("a")
			var key *KeyError
			if !errors.As(err, &key) || !errors.Is(err, ErrUnreadable) || (test.key != "" && key.Key != test.key) {
				t.Fatalf("got %v, want one that names %s", err, test.key)
			}
			if test.scope != (Scope{}) {
				if diff := cmp.Diff(before, h.values("b")); diff != "" {
					t.Errorf("another workspace's secrets: %s", diff)
				}
			}

			// The old values again: equal, but not readable, so they change.
			heal := set("K", "1", "L", "2")
			if test.key != "" {
				heal = set(test.key, "1")
			}
			r := must(h.UpdateSecrets(ctx, test.scope, heal, Options{}))(t)
			if !r.Changed {
				t.Error("a secret that can't be opened counts as equal")
			}
			if _, err := h.Snapshot("a"); err != nil {
				t.Errorf("not healed: %v", err)
			}
		})
	}
}

func TestContract18_AllOrNothing(t *testing.T) {
	h := newHarness(t)
	w := h.create("a", value("K", "1"), value("L", "2"))
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketSealed).Put(ownerOf(&w).value("L", 1), []byte("x")) })
	s, err := h.Snapshot("a")
	if !errors.Is(err, ErrUnreadable) || len(s.Secrets) != 0 || s.Workspace.ID != "" {
		t.Errorf("got %+v, %v", s, err)
	}
}

func TestContract19_OwnSecretsWin(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("BOTH", "own"), value("OWN", "own"))
	h.create("b")
	must(h.UpdateSecrets(ctx, Scope{}, set("BOTH", "global", "GLOBAL", "global"), Options{}))(t)
	check := func(id string, want map[string]string) {
		t.Helper()
		if diff := cmp.Diff(want, h.values(id)); diff != "" {
			t.Errorf("%s: %s", id, diff)
		}
	}
	check("a", map[string]string{"BOTH": "own", "OWN": "own", "GLOBAL": "global"})
	check("b", map[string]string{"BOTH": "global", "GLOBAL": "global"})

	s := must(h.Snapshot("a"))(t)
	if !slices.IsSortedFunc(s.Secrets, func(a, b OpenedSecret) int { return strings.Compare(a.Key, b.Key) }) {
		t.Error("not in order of the keys")
	}

	// A hidden one need not be readable.
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketSealed).Put(owner{}.value("BOTH", 1), []byte("x")) })
	check("a", map[string]string{"BOTH": "own", "OWN": "own", "GLOBAL": "global"})
	must(h.UpdateSecrets(ctx, Scope{}, set("BOTH", "global"), Options{}))(t)

	must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"BOTH"}}, Options{}))(t)
	check("a", map[string]string{"BOTH": "global", "OWN": "own", "GLOBAL": "global"})
	must(h.UpdateSecrets(ctx, Scope{}, SecretsUpdate{Delete: []string{"BOTH"}}, Options{}))(t)
	check("a", map[string]string{"OWN": "own", "GLOBAL": "global"})
	check("b", map[string]string{"GLOBAL": "global"})
}

func TestContract20_AtomicBatch(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("OLD", "1"), value("SAME", "1"))
	h.record.take()
	commits := h.ended()
	r := must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{
		Set: set("B", "2", "SAME", "1", "A", "3").Set, Delete: []string{"OLD", "MISSING"},
	}, Options{}))(t)
	if r.Workspace.Generation != 2 || h.ended() != commits+1 || len(h.record.take()) != 1 {
		t.Errorf("generation %d after %d commits", r.Workspace.Generation, h.ended()-commits)
	}
	if diff := cmp.Diff(map[string]string{"A": "3", "B": "2", "SAME": "1"}, h.values("a")); diff != "" {
		t.Error(diff)
	}
	var keys []string
	for _, s := range r.Secrets {
		keys = append(keys, s.Key)
	}
	if diff := cmp.Diff([]string{"B", "SAME", "A"}, keys); diff != "" {
		t.Error(diff)
	}

	// One that is refused: nothing of it is done.
	before := dump(t, h.db)
	for name, u := range map[string]SecretsUpdate{
		"quota":     {Set: append(set("A", "x").Set, value("C", strings.Repeat("x", MaxValueBytes+1))), Delete: []string{"B"}},
		"model key": {Set: set("A", "x", DefaultModelEnv, "x").Set},
		"missing":   {Set: set("A", "x").Set, Delete: []string{"MISSING"}, MustExist: true},
		"twice":     {Set: set("A", "x", "A", "y").Set},
		"both":      {Set: set("A", "x").Set, Delete: []string{"A"}},
		"no key":    {Set: set("A", "x", "", "y").Set},
	} {
		if _, err := h.UpdateSecrets(ctx, in("a"), u, Options{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if diff := cmp.Diff(before, dump(t, h.db)); diff != "" {
		t.Error(diff)
	}
}

func TestSecrets_VersionsNameOneValue(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	for _, scope := range []Scope{in("a"), {}} {
		var created, updated Secret
		for i := range 3 {
			created = must(h.UpdateSecrets(ctx, scope, set("K", fmt.Sprint("a", i)), Options{}))(t).Secrets[0]
			updated = must(h.UpdateSecrets(ctx, scope, set("K", fmt.Sprint("b", i)), Options{}))(t).Secrets[0]
			want := int64(2*i + 1)
			if created.Version != want || updated.Version != want+1 {
				t.Fatalf("versions %d and %d, want %d and the next", created.Version, updated.Version, want)
			}
			if !updated.CreateTime.Equal(created.CreateTime) || !updated.UpdateTime.After(created.UpdateTime) {
				t.Errorf("times %v and %v", created, updated)
			}
			if diff := cmp.Diff(updated, must(h.Secret(scope, "K"))(t)); diff != "" {
				t.Error(diff)
			}
			must(h.UpdateSecrets(ctx, scope, SecretsUpdate{Delete: []string{"K"}}, Options{}))(t)
			h.reopen()
			if _, err := h.Secret(scope, "K"); !errors.Is(err, ErrNotFound) {
				t.Errorf("deleted: got %v", err)
			}
		}
		if created.Etag() == updated.Etag() {
			t.Error("two versions have one etag")
		}
	}
}

// Deleted keys take no room without end, and their versions are still not used
// twice.
func TestSecrets_RetiredKeysAreFolded(t *testing.T) {
	h := newHarness(t)
	w := h.create("a", value("KEPT", "v"))
	for range 3 {
		must(h.UpdateSecrets(ctx, in("a"), set("FIRST", "1"), Options{}))(t)
		must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"FIRST"}}, Options{}))(t)
	}
	for i := 0; i < maxRetired; i += 64 {
		var u SecretsUpdate
		var d SecretsUpdate
		for j := range 64 {
			key := fmt.Sprintf("K%d", i+j)
			u.Set = append(u.Set, value(key, "x"))
			d.Delete = append(d.Delete, key)
		}
		must(h.UpdateSecrets(ctx, in("a"), u, Options{}))(t)
		must(h.UpdateSecrets(ctx, in("a"), d, Options{}))(t)
	}
	if n := len(dump(t, h.db)["secrets"]); n != 2 { // one is the owner's
		t.Errorf("%d rows are left", n)
	}
	r := must(h.UpdateSecrets(ctx, in("a"), set("FIRST", "2", "NEW", "2", "KEPT", "v2"), Options{}))(t)
	for i, want := range []int64{4, 4, 2} {
		if r.Secrets[i].Version != want {
			t.Errorf("%s has version %d, want %d", r.Secrets[i].Key, r.Secrets[i].Version, want)
		}
	}
	if diff := cmp.Diff(map[string]string{"FIRST": "2", "NEW": "2", "KEPT": "v2"}, h.values("a")); diff != "" {
		t.Error(diff)
	}
	checkSums(t, h, ownerOf(&w))
	checkSums(t, h, owner{})
}

// checkSums compares an owner's sums with its rows.
func checkSums(t testT, h *harness, o owner) {
	t.Helper()
	err := h.view(func(tx *bolt.Tx) error {
		var want sums
		got, _, err := openOwner(tx, h.sealer, o.name())
		if err != nil {
			return err
		}
		want.lastVersion = got.lastVersion
		o.each(tx, nil, "", func(key string, r *secretRecord) bool {
			var have []int64
			prefix := valuesOf(o.row(key))
			c := tx.Bucket(bucketSealed).Cursor()
			for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
				_, version, _ := parseValue(k)
				if have = append(have, version); !r.hasValue(version) {
					t.Errorf("%s: there is a value of version %d", key, version)
				}
			}
			versions := r.Older
			if !r.Deleted {
				versions = append([]versionRecord{r.current()}, versions...)
			}
			for _, v := range versions {
				if v.State != VersionDestroyed && !slices.Contains(have, v.Version) {
					t.Errorf("%s: there is no value of version %d", key, v.Version)
				}
			}
			if r.Deleted {
				want.retired++
			} else {
				want.bytes += r.Size
				want.keyBytes += len(key)
			}
			return true
		})
		if got != want {
			t.Errorf("%s: sums %+v, want %+v", o.name(), got, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestSecrets_Quotas(t *testing.T) {
	for _, test := range []struct {
		scope Scope
		limit int
	}{{in("a"), MaxWorkspaceBytes}, {Scope{}, MaxGlobalBytes}} {
		t.Run(fmt.Sprintf("%+v", test.scope), func(t *testing.T) {
			h := newHarness(t)
			h.create("a")
			full := strings.Repeat("x", MaxValueBytes)
			var u SecretsUpdate
			for i := range test.limit / MaxValueBytes {
				u.Set = append(u.Set, value(fmt.Sprintf("K%d", i), full))
			}
			tooMuch := u
			tooMuch.Set = append(slices.Clone(u.Set), value("MORE", "x"))
			want := &QuotaError{test.scope, test.limit, test.limit + 1}
			refused := func(u SecretsUpdate) {
				t.Helper()
				_, err := h.UpdateSecrets(ctx, test.scope, u, Options{})
				if diff := cmp.Diff(error(want), err); diff != "" || !errors.Is(err, ErrTooLarge) {
					t.Error(diff)
				}
			}
			refused(tooMuch)
			must(h.UpdateSecrets(ctx, test.scope, u, Options{}))(t)
			refused(set("MORE", "x"))
			// What frees as much as it takes is fine, so is an empty value, another
			// value of the same size, and a deletion.
			swap := set("MORE", "x")
			swap.Delete = []string{"K0"}
			must(h.UpdateSecrets(ctx, test.scope, set("EMPTY", "", "K1", strings.Repeat("y", MaxValueBytes)), Options{}))(t)
			must(h.UpdateSecrets(ctx, test.scope, swap, Options{}))(t)
			must(h.UpdateSecrets(ctx, test.scope, set("K0", full[1:]), Options{}))(t)
			refused(set("K0", full))
			checkSums(t, h, must(h.owner(test.scope))(t))
		})
	}
}

func (h *harness) owner(scope Scope) (o owner, err error) {
	err = h.view(func(tx *bolt.Tx) error {
		o, err = ownerIn(tx, scope)
		return err
	})
	return o, err
}

func TestSecrets_KeysAreBounded(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	err := error(nil)
	n := 0
	for err == nil && n < 100_000 {
		var u SecretsUpdate
		for range 512 {
			u.Set = append(u.Set, value(fmt.Sprintf("%0128d", n), ""))
			n++
		}
		_, err = h.UpdateSecrets(ctx, in("a"), u, Options{})
	}
	if !errors.Is(err, ErrTooLarge) || (n-512)*128 > maxKeyBytes {
		t.Errorf("after %d empty secrets: %v", n, err)
	}
}

func TestListSecrets(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("B", "1"), value("AB", "2"), value("A", "3"), value("C", "4"), value("GONE", "5"))
	h.create("b", value("OTHER", "1"))
	must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"GONE"}}, Options{}))(t)
	must(h.UpdateSecrets(ctx, Scope{}, set("G2", "1", "G1", "1"), Options{}))(t)
	for _, test := range []struct {
		scope Scope
		after string
		limit int
		want  string
		more  bool
	}{
		{in("a"), "", 0, "A AB B C", false},
		{in("a"), "", 4, "A AB B C", false},
		{in("a"), "", 3, "A AB B", true},
		{in("a"), "A", 2, "AB B", true},
		{in("a"), "AB", 2, "B C", false},
		{in("a"), "AA", 1, "AB", true},
		{in("a"), "C", 2, "", false},
		{Scope{}, "", 0, "G1 G2", false},
		{Scope{}, "G1", 1, "G2", false},
	} {
		secrets, more, err := h.ListSecrets(test.scope, test.after, test.limit)
		if err != nil {
			t.Fatal(err)
		}
		var keys []string
		for _, s := range secrets {
			keys = append(keys, s.Key)
			if s.WorkspaceID != test.scope.WorkspaceID || s.Version != 1 || s.Size != 1 || s.CreateTime.IsZero() {
				t.Errorf("got %+v", s)
			}
		}
		if got := strings.Join(keys, " "); got != test.want || more != test.more {
			t.Errorf("%+v: got %s, more is %t", test, got, more)
		}
	}
	if _, _, err := h.ListSecrets(in("n"), "", 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	for _, test := range []struct {
		scope Scope
		key   string
		want  NotFoundError
	}{
		{in("n"), "K", NotFoundError{WorkspaceID: "n"}},
		{in("a"), "GONE", NotFoundError{WorkspaceID: "a", Key: "GONE"}},
		{Scope{}, "A", NotFoundError{Key: "A"}},
	} {
		_, err := h.Secret(test.scope, test.key)
		if diff := cmp.Diff(error(&test.want), err); diff != "" {
			t.Error(diff)
		}
	}
	for _, f := range []func(string) error{
		func(id string) error { _, err := h.Snapshot(id); return err },
		func(id string) error { _, err := h.Workspace(id); return err },
	} {
		for _, id := range []string{"n", ""} {
			if err := f(id); !errors.Is(err, ErrNotFound) {
				t.Errorf("%q: got %v", id, err)
			}
		}
	}
}

func TestSecrets_Etag(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("K", "1"))
	etag := ptr(must(h.Secret(in("a"), "K"))(t)).Etag()
	r := must(h.UpdateSecrets(ctx, in("a"), set("K", "2"), Options{Etag: etag}))(t)
	if _, err := h.UpdateSecrets(ctx, in("a"), set("K", "3"), Options{Etag: etag}); !errors.Is(err, ErrEtag) {
		t.Errorf("the old etag: got %v", err)
	}
	must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"K"}}, Options{Etag: r.Secrets[0].Etag()}))(t)
	if _, err := h.UpdateSecrets(ctx, in("a"), set("K", "3", "L", "3"), Options{Etag: etag}); err == nil {
		t.Error("one etag for two secrets")
	}
}

func TestGlobalSecrets_ReachWhoSeesThem(t *testing.T) {
	h := newHarness(t)
	h.create("hides", value("G", "own"))
	model := func(id, model string) {
		must(h.UpdateWorkspace(ctx, id, func(e *Editable) error {
			e.Spec.ModelEnv, e.Model = []string{"G"}, model
			return nil
		}, Options{}))(t)
	}
	h.create("model")
	model("model", "m") // hides it too
	h.create("nomodel")
	model("nomodel", "")
	h.create("sees")
	h.create("parked")
	must(h.StopWorkspace(ctx, "parked", Options{}))(t)
	h.create("deleting")
	must(h.DeleteWorkspace(ctx, "deleting", false, Options{}))(t)
	h.record.take()
	r := must(h.UpdateSecrets(ctx, Scope{}, set("G", "1"), Options{}))(t)
	var ids []string
	for _, c := range h.record.take() {
		ids = append(ids, c.ID)
	}
	if diff := cmp.Diff([]string{"nomodel", "parked", "sees"}, ids); diff != "" || r.Affected != 3 || !r.Changed {
		t.Errorf("%s %+v", diff, r)
	}
	for id, want := range map[string]int64{"hides": 1, "model": 2, "nomodel": 3, "sees": 2, "parked": 2, "deleting": 1} {
		if w := must(h.Workspace(id))(t); w.Generation != want {
			t.Errorf("%s has generation %d, want %d", id, w.Generation, want)
		}
	}
}

// A snapshot is one read transaction: its generation and its values belong
// together, whatever is written meanwhile.
func TestSnapshot_IsOneTransaction(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("K", "1"), value("L", "1"))
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(done)
		for i := 2; i <= 200; i++ {
			v := fmt.Sprint(i) // the generation that this makes
			must(h.UpdateSecrets(ctx, in("a"), set("K", v, "L", v), Options{}))(t)
		}
	})
	for range 4 {
		wg.Go(func() {
			for last := int64(0); ; {
				s, err := h.Snapshot("a")
				if err != nil {
					t.Error(err)
					return
				}
				want := fmt.Sprint(s.Workspace.Generation)
				if k, l := s.Secrets[0].Value.Reveal(), s.Secrets[1].Value.Reveal(); k != want || l != want || s.Workspace.Generation < last {
					t.Errorf("generation %s after %d has K=%s L=%s", want, last, k, l)
					return
				}
				last = s.Workspace.Generation
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	wg.Wait()
}
