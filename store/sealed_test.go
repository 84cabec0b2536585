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
	"pgregory.net/rapid"

	"github.com/workspaced/workspaced/store/seal"
)

// What sealing is to give, each by rows that the store itself has written and that
// somebody changes who can write the file, but has not the key.

// sealedWorld has two workspaces and global secrets with the same keys, and
// versions.
type sealedWorld struct {
	*harness
	owners map[string]owner // by the name of a workspace, and "" for the global one
	steps  []map[string]map[string]string
	want   []map[string]map[string]string // what the workspaces get at each step
}

func newSealedWorld(t *testing.T) *sealedWorld {
	t.Helper()
	w := &sealedWorld{harness: newHarness(t), owners: map[string]owner{"": {}}}
	w.db.NoSync = true
	for _, id := range []string{"a", "b"} {
		record := w.create(id, value("K", id), value("L", id))
		w.owners[id] = ownerOf(&record)
	}
	must(w.UpdateSecrets(ctx, Scope{}, set("K", "hidden", "G", "g"), Options{}))(t)
	for n := range 4 {
		for id := range w.owners {
			// Of another size each time: the sums differ.
			u := set("K", strings.Repeat(id+"k", n+1), "L", strings.Repeat(id+"l", n+1))
			if id == "" {
				u = set("K", strings.Repeat("hidden", n+1), "G", strings.Repeat("g", n+2))
			}
			must(w.UpdateSecrets(ctx, Scope{WorkspaceID: id}, u, Options{}))(t)
		}
		values, err := w.read()
		if err != nil {
			t.Fatal(err)
		}
		w.steps, w.want = append(w.steps, dump(t, w.db)), append(w.want, values)
	}
	return w
}

func (w *sealedWorld) now() map[string]map[string]string { return w.steps[len(w.steps)-1] }

// read returns what the workspaces get, and why one of them gets nothing.
func (w *sealedWorld) read() (values map[string]map[string]string, err error) {
	values = map[string]map[string]string{}
	for id := range w.owners {
		if id == "" {
			continue
		}
		snapshot, failed := w.Snapshot(id)
		if failed != nil {
			err = errors.Join(err, failed)
			continue
		}
		values[id] = map[string]string{}
		for _, s := range snapshot.Secrets {
			values[id][s.Key] = s.Value.Reveal()
		}
	}
	return values, err
}

// noticed checks that nobody gets anything but what is right, and reports whether
// somebody gets an error: a workspace, or who rolls back to an older version.
func (w *sealedWorld) noticed(t testT) bool {
	t.Helper()
	values, err := w.read()
	right := w.want[len(w.want)-1]
	for id, got := range values {
		if diff := cmp.Diff(right[id], got); diff != "" {
			t.Errorf("%s gets something else: %s", id, diff)
		}
	}
	known := func(err error) bool {
		return errors.Is(err, ErrUnreadable) || errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrVersionDestroyed)
	}
	if err != nil && !known(err) {
		t.Errorf("got %v", err)
	}
	for id, o := range w.owners {
		for key, version := range w.versions(o) {
			_, failed := w.UpdateSecrets(ctx, Scope{WorkspaceID: id}, SecretsUpdate{RollBack: &RollBack{key, version - 1}}, Options{ValidateOnly: true})
			if failed != nil && !known(failed) {
				t.Errorf("a rollback: got %v", failed)
			}
			err = errors.Join(err, failed)
		}
	}
	return err != nil
}

// versions returns the current versions that an owner's keys have had before
// anybody changed anything.
func (w *sealedWorld) versions(o owner) map[string]int64 {
	versions := map[string]int64{}
	for k := range w.now()["sealed"] {
		row, version, err := parseValue([]byte(k))
		if key, ok := strings.CutPrefix(string(row), o.name()+"/"); ok && err == nil {
			versions[key] = max(versions[key], version)
		}
	}
	return versions
}

// with reads by f what there is with other rows, and puts the right ones back.
func (w *sealedWorld) with(rows map[string]map[string]string, f func()) {
	w.t.Helper()
	w.replaceRows(rows)
	f()
	w.replaceRows(w.now())
}

// replaceRows has these rows, in the buckets that belong to secrets, and no others.
func (w *sealedWorld) replaceRows(rows map[string]map[string]string) {
	w.t.Helper()
	w.edit(func(tx *bolt.Tx) error {
		for _, name := range secretBuckets {
			b := tx.Bucket([]byte(name))
			var gone [][]byte
			if err := b.ForEach(func(k, _ []byte) error {
				if _, ok := rows[name][string(k)]; !ok {
					gone = append(gone, k)
				}
				return nil
			}); err != nil {
				return err
			}
			for _, k := range gone {
				if err := b.Delete(k); err != nil {
					return err
				}
			}
			for k, v := range rows[name] {
				if string(b.Get([]byte(k))) != v {
					if err := b.Put([]byte(k), []byte(v)); err != nil {
						return err
					}
				}
			}
		}
		return nil
	})
}

var secretBuckets = []string{"secrets", "sealed"}

func cloneRows(rows map[string]map[string]string) map[string]map[string]string {
	rows = maps.Clone(rows)
	for name := range rows {
		rows[name] = maps.Clone(rows[name])
	}
	return rows
}

type rowPlace struct{ bucket, key string }

// places returns all rows of secrets.
func (w *sealedWorld) places() (places []rowPlace) {
	for _, name := range secretBuckets {
		for _, key := range slices.Sorted(maps.Keys(w.now()[name])) {
			places = append(places, rowPlace{name, key})
		}
	}
	return places
}

// looked reports whether noticed looks at the row: not at versions before the last
// two, nor at a current one that own ones hide.
func (w *sealedWorld) looked(p rowPlace) bool {
	if p.bucket != "sealed" {
		return true
	}
	row, version, err := parseValue([]byte(p.key))
	if err != nil {
		return true
	}
	name, key, _ := strings.Cut(string(row), "/")
	return version >= w.versions(ownerNamed(name))[key]-1 &&
		(name != globalOwner || key != "K" || version == w.versions(owner{})[key]-1)
}

// Nothing in the file tells anything of a value but its length, and the same value
// sealed again looks like another one.
func TestSealed_Confidential(t *testing.T) {
	h := newHarness(t)
	h.db.NoSync = true
	h.create("a")
	calls := 0
	rapid.Check(t, func(rt *rapid.T) {
		v := rapid.SliceOfN(rapid.Byte(), 16, 200).Draw(rt, "value")
		scope := Scope{WorkspaceID: rapid.SampledFrom([]string{"", "a"}).Draw(rt, "scope")}
		secret := func(key string) SecretValue {
			return SecretValue{Key: key, Value: seal.New(slices.Clone(v)), Delivery: DeliveryFiles}
		}
		must(h.UpdateSecrets(ctx, scope, SecretsUpdate{Set: []SecretValue{secret("K"), secret("L")}}, request(fmt.Sprint(calls), string(v))))(rt)
		rows := dump(rt, h.db)
		pieces := map[string]bool{}
		var lengths []int
		o := owner{}
		if !scope.Global() {
			o = ownerOf(ptr(must(h.Workspace("a"))(rt)))
		}
		for _, key := range []string{"K", "L"} {
			r := must(h.Secret(scope, key))(rt)
			sealed := rows["sealed"][string(o.value(key, r.Version))]
			lengths = append(lengths, len(sealed))
			const size = 8 // of a piece, after the key's id
			for n := 5; n+size <= len(sealed); n++ {
				if pieces[sealed[n:n+size]] {
					rt.Errorf("what is sealed twice is alike from byte %d on", n)
				}
			}
			for n := 5; n+size <= len(sealed); n++ {
				pieces[sealed[n:n+size]] = true
			}
		}
		if lengths[0] != len(v)+seal.Overhead || lengths[1] != lengths[0] {
			rt.Errorf("%d bytes are sealed with %v", len(v), lengths)
		}
		// TestContract21_NoPlaintextInTheFiles looks for values in any form.
		for bucket, rows := range rows {
			for key, row := range rows {
				if strings.Contains(row, string(v)) {
					rt.Errorf("%s/%s has the value", bucket, key)
				}
			}
		}
		calls++
	})
}

// Any bit of any row that is flipped is noticed.
func TestSealed_Integrity(t *testing.T) {
	w := newSealedWorld(t)
	places := w.places()
	rapid.Check(t, func(rt *rapid.T) {
		p := rapid.SampledFrom(places).Draw(rt, "row")
		rows := cloneRows(w.now())
		row := []byte(rows[p.bucket][p.key])
		bit := rapid.IntRange(0, 8*len(row)-1).Draw(rt, "bit")
		row[bit/8] ^= 1 << (bit % 8)
		rows[p.bucket][p.key] = string(row)
		w.with(rows, func() {
			if !w.noticed(rt) && w.looked(p) {
				rt.Errorf("bit %d of %q in %s: nobody notices", bit, p.key, p.bucket)
			}
		})
	})
}

// Any row that is cut off, or gone, is noticed.
func TestSealed_CutIntegrity(t *testing.T) {
	w := newSealedWorld(t)
	places := w.places()
	rapid.Check(t, func(rt *rapid.T) {
		p := rapid.SampledFrom(places).Draw(rt, "row")
		rows := cloneRows(w.now())
		left := rapid.IntRange(0, len(rows[p.bucket][p.key])-1).Draw(rt, "left")
		rows[p.bucket][p.key] = rows[p.bucket][p.key][:left]
		if left == 0 {
			delete(rows[p.bucket], p.key)
		}
		w.with(rows, func() {
			if !w.noticed(rt) && w.looked(p) {
				rt.Errorf("%d bytes are left of %q in %s: nobody notices", left, p.key, p.bucket)
			}
		})
	})
}

// A row that was put in the place of another, of another workspace, scope, key or
// version, is noticed: alone, or all rows of a secret together.
func TestSealed_MoveIntegrity(t *testing.T) {
	w := newSealedWorld(t)
	places := w.places()
	rapid.Check(t, func(rt *rapid.T) {
		from := rapid.SampledFrom(places).Draw(rt, "from")
		versions := from.bucket == "sealed" && rapid.Bool().Draw(rt, "another version")
		to := rapid.SampledFrom(slices.DeleteFunc(slices.Clone(places), func(p rowPlace) bool {
			secret, _, _ := strings.Cut(from.key, "\x00")
			return p.bucket != from.bucket || w.now()[p.bucket][p.key] == w.now()[from.bucket][from.key] ||
				versions && !strings.HasPrefix(p.key, secret+"\x00")
		})).Draw(rt, "to")
		rows := cloneRows(w.now())
		rows[to.bucket][to.key] = rows[from.bucket][from.key]
		w.with(rows, func() {
			if !w.noticed(rt) && w.looked(to) {
				rt.Errorf("%s: %q in the place of %q: nobody notices", to.bucket, from.key, to.key)
			}
		})
	})
	type secret struct{ owner, key string }
	var secrets []secret
	for id, keys := range map[string][]string{"": {"K", "G"}, "a": {"K", "L"}, "b": {"K", "L"}} {
		for _, key := range keys {
			secrets = append(secrets, secret{w.owners[id].name(), key})
		}
	}
	slices.SortFunc(secrets, func(a, b secret) int { return strings.Compare(a.owner+a.key, b.owner+b.key) })
	rapid.Check(t, func(rt *rapid.T) {
		from := rapid.SampledFrom(secrets).Draw(rt, "from")
		to := rapid.SampledFrom(secrets).Filter(func(s secret) bool { return s != from }).Draw(rt, "to")
		rows := cloneRows(w.now())
		move := func(from, to secret) {
			prefix := to.owner + "/" + to.key
			for _, bucket := range []string{"secrets", "sealed"} {
				maps.DeleteFunc(rows[bucket], func(k, _ string) bool { return k == prefix || strings.HasPrefix(k, prefix+"\x00") })
				for k, v := range w.now()[bucket] {
					rest, ok := strings.CutPrefix(k, from.owner+"/"+from.key)
					if ok && (rest == "" || rest[0] == 0) {
						rows[bucket][prefix+rest] = v
					}
				}
			}
		}
		move(from, to)
		if rapid.Bool().Draw(rt, "swap") {
			move(to, from)
		}
		w.with(rows, func() {
			if !w.noticed(rt) {
				rt.Errorf("%v in the place of %v: nobody notices", from, to)
			}
		})
	})
}

// Rows that were put back as they were at an earlier time, of one secret or of all
// that an owner has, are noticed unless its sums and its index are among them.
func TestSealed_RollbackIntegrity(t *testing.T) {
	w := newSealedWorld(t)
	rapid.Check(t, func(rt *rapid.T) {
		then := rapid.IntRange(0, len(w.steps)-2).Draw(rt, "step")
		o := w.owners[rapid.SampledFrom([]string{"", "a", "b"}).Draw(rt, "owner")]
		buckets := rapid.SliceOfNDistinct(rapid.SampledFrom(secretBuckets), 1, len(secretBuckets)-1, rapid.ID).Draw(rt, "buckets")
		key := ""
		if rapid.Bool().Draw(rt, "one secret") {
			key = rapid.SampledFrom(slices.Sorted(maps.Keys(w.versions(o)))).Draw(rt, "key")
		}
		rows := w.putBack(o, w.steps[then], buckets, key)
		changed := !cmp.Equal(rows, w.now())
		w.with(rows, func() {
			// What only takes away versions that nobody looks for is no matter.
			if !w.noticed(rt) && changed && !slices.Equal(buckets, []string{"sealed"}) {
				rt.Errorf("%q of %q in %v as of step %d: nobody notices", key, o.name(), buckets, then)
			}
		})
	})
}

// putBack returns the rows with those of an owner, in some buckets, as they were;
// with a key only those of one secret, in the buckets where it has its own.
func (w *sealedWorld) putBack(o owner, then map[string]map[string]string, buckets []string, key string) map[string]map[string]string {
	rows := cloneRows(w.now())
	ours := func(k string) bool {
		prefix := o.name() + "/" + key
		return k == o.name() || strings.HasPrefix(k, prefix) && (key == "" || k == prefix || k[len(prefix)] == 0)
	}
	for _, bucket := range buckets {
		maps.DeleteFunc(rows[bucket], func(k, _ string) bool { return ours(k) })
		for k, v := range then[bucket] {
			if ours(k) {
				rows[bucket][k] = v
			}
		}
	}
	return rows
}

// What the design does not notice, which docs/security.md says: all that an owner
// has, put back together. Nobody else's secrets change by it.
func TestSealed_WholeOwnerIsNotNoticed(t *testing.T) {
	w := newSealedWorld(t)
	for id, o := range w.owners {
		for then := range len(w.steps) - 1 {
			w.with(w.putBack(o, w.steps[then], secretBuckets, ""), func() {
				got, err := w.read()
				if err != nil {
					t.Errorf("%q, step %d: it is noticed now, say so in docs/security.md: %v", id, then, err)
					return
				}
				for _, other := range []string{"a", "b"} {
					want := maps.Clone(w.want[len(w.want)-1][other])
					for key := range want {
						own := key != "G"
						if own && other == id || !own && id == "" {
							want[key] = w.want[then][other][key]
						}
					}
					if diff := cmp.Diff(want, got[other]); diff != "" {
						t.Errorf("%q put back, %s gets: %s", id, other, diff)
					}
				}
			})
		}
	}
}

// Sums that can't be are damage, whoever has sealed them.
func TestSealed_NegativeSums(t *testing.T) {
	h := newHarness(t)
	for _, s := range []sums{{}, {bytes: -1}, {keyBytes: -1}, {retired: -1}, {lastVersion: -1}} {
		row := must(sealOwner(h.sealer, []byte(globalOwner), &s, nil))(t)
		got, _, err := openOwnerRow(h.sealer, []byte(globalOwner), row)
		if s.valid() != (s == sums{}) || errors.Is(err, ErrDamaged) == s.valid() || got != (sums{}) {
			t.Errorf("%+v: got %+v, %v", s, got, err)
		}
	}
}

// Rows in secrets and the owner's own one as they were together, as in a page of which
// the disk has lost what was written last, are noticed by the values: also when only a
// key was new, or was deleted before, or all that the owner has is lost.
func TestSealed_LostPage(t *testing.T) {
	for name, from := range map[string]func(h *harness, scope Scope){
		"nothing": func(*harness, Scope) {},
		"another": func(h *harness, scope Scope) {
			must(h.UpdateSecrets(ctx, scope, set("J", "j", "L", "l"), Options{}))(h.t)
		},
		"global": func(h *harness, _ Scope) { must(h.UpdateSecrets(ctx, Scope{}, set("K", "global"), Options{}))(h.t) },
		"deleted": func(h *harness, scope Scope) {
			must(h.UpdateSecrets(ctx, scope, set("K", "0"), Options{}))(h.t)
			must(h.UpdateSecrets(ctx, scope, SecretsUpdate{Delete: []string{"K"}}, Options{}))(h.t)
		},
		"folded": func(h *harness, scope Scope) {
			must(h.UpdateSecrets(ctx, scope, set("KK", "0"), Options{}))(h.t)
			must(h.UpdateSecrets(ctx, scope, SecretsUpdate{Delete: []string{"KK"}}, Options{}))(h.t)
		},
	} {
		for _, scope := range []Scope{{}, in("a")} {
			t.Run(fmt.Sprint(name, " ", scope.WorkspaceID), func(t *testing.T) {
				h := newHarness(t)
				h.create("a")
				from(h, scope)
				before := dump(t, h.db)["secrets"]
				must(h.UpdateSecrets(ctx, scope, set("K", "1"), Options{}))(t)
				h.edit(func(tx *bolt.Tx) error {
					if err := tx.DeleteBucket(bucketSecrets); err != nil {
						return err
					}
					b, err := tx.CreateBucket(bucketSecrets)
					for k, v := range before {
						err = errors.Join(err, b.Put([]byte(k), []byte(v)))
					}
					return err
				})
				var failed *KeyError
				if _, err := h.Snapshot("a"); !errors.As(err, &failed) || failed.Key != "K" || !errors.Is(err, ErrUnreadable) {
					t.Fatalf("got %v", err)
				}
				if !scope.Global() { // nobody else is hurt
					h.create("b")
					h.values("b")
				}
				// Set anew it is healed.
				must(h.UpdateSecrets(ctx, scope, set("K", "2"), Options{}))(t)
				if got := h.values("a")["K"]; got != "2" {
					t.Errorf("got %q", got)
				}
				h.reopen()
			})
		}
	}
}

// A database opens with its key alone: not with another one, not with the data
// keys of another database under the same one, and, once that is lost, never again.
func TestSealed_WrongKey(t *testing.T) {
	w := newSealedWorld(t)
	w.close()
	for _, former := range []seal.KEK{nil, must(seal.Parse("former", must(seal.NewLocal())(t)))(t)} {
		cfg := w.cfg
		cfg.KEK, cfg.FormerKEK = must(seal.Parse("another", must(seal.NewLocal())(t)))(t), former
		refused(t, cfg, ErrWrongKey)
	}

	other := newHarness(t)
	other.close()
	cfg := other.cfg
	cfg.KEK, cfg.Path = w.cfg.KEK, filepath.Join(t.TempDir(), "workspaced.db")
	s := must(Open(cfg))(t) // of the same KEK
	keys := dump(t, s.db)["meta"]["keys"]
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	putMeta(t, w.cfg.Path, "keys", keys)
	refused(t, w.cfg, ErrWrongKey)
	putMeta(t, w.cfg.Path, "keys", w.now()["meta"]["keys"])
	w.open()
	if w.noticed(t) {
		t.Error("with its key it does not open")
	}
}

// putMeta writes a row of meta into a database that nobody has open.
func putMeta(t testT, path, key, row string) {
	t.Helper()
	db, file, err := openFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	db.NoSync = true
	if err := db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Put([]byte(key), []byte(row)) }); err != nil {
		t.Fatal(err)
	}
	closeFile(db, file)
}

func TestSealed_LostKey(t *testing.T) {
	w := newSealedWorld(t)
	w.close()
	path := filepath.Join(filepath.Dir(w.cfg.Path), "key")
	kept := must(os.ReadFile(path))(t)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	cfg := w.cfg
	cfg.KEK = must(seal.LoadOrCreate(path))(t) // who makes a new one has another one
	refused(t, cfg, ErrWrongKey)
	if err := os.WriteFile(path, kept, 0o600); err != nil { // from a backup
		t.Fatal(err)
	}
	w.cfg.KEK = must(seal.Load(path))(t)
	w.open()
	if w.noticed(t) {
		t.Error("with its key it does not open")
	}
}

// The data keys in the database are of no use to who changes them: whatever bit is
// flipped, the database is refused, or it opens and all is right.
func TestSealed_KeysIntegrity(t *testing.T) {
	w := newSealedWorld(t)
	w.close()
	file := must(os.ReadFile(w.cfg.Path))(t)
	cfg := w.cfg
	cfg.Path = filepath.Join(t.TempDir(), "workspaced.db")
	refusals := 0
	rapid.Check(t, func(rt *rapid.T) {
		place := rapid.SampledFrom([]string{"keys", "check"}).Draw(rt, "row")
		row := []byte(w.now()["meta"][place])
		bit := rapid.IntRange(0, 8*len(row)-1).Draw(rt, "bit")
		row[bit/8] ^= 1 << (bit % 8)
		if err := os.WriteFile(cfg.Path, file, 0o600); err != nil {
			rt.Fatal(err)
		}
		putMeta(rt, cfg.Path, place, string(row))
		s, err := Open(cfg)
		if err != nil {
			if !errors.Is(err, ErrWrongKey) && !errors.Is(err, ErrDamaged) {
				rt.Errorf("got %v", err)
			}
			refusals++
			return
		}
		defer func() { _ = s.Close() }()
		if place == "check" {
			rt.Errorf("bit %d of check: nobody notices", bit)
		}
		opened := *w
		opened.harness = &harness{Store: s, t: rt}
		if opened.noticed(rt) {
			rt.Error("it was opened, and something is wrong")
		}
	})
	if refusals == 0 {
		t.Error("nothing was refused")
	}
}
