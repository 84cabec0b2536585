package store

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

func back(key string, version int64) SecretsUpdate {
	return SecretsUpdate{RollBack: &RollBack{key, version}}
}

// versions is what the list says: newest first, the current one with a star, the
// version that it was restored from, and other states.
func (h *harness) versions(scope Scope, key string) string {
	h.t.Helper()
	list, more, err := h.ListSecretVersions(scope, key, 0, 0)
	if err != nil || more {
		h.t.Fatalf("more is %t, %v", more, err)
	}
	var words []string
	for _, v := range list {
		word := fmt.Sprint(v.Version)
		if v.Current {
			word += "*"
		}
		if v.Restored != 0 {
			word += fmt.Sprint("<", v.Restored)
		}
		if v.State != VersionEnabled {
			word += " " + strings.ToLower(string(v.State))
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

// A rollback is a change like any other: a new version with the old value, a new
// generation; none when the value is the same.
func TestRollBack(t *testing.T) {
	for _, scope := range []Scope{in("a"), {}} {
		t.Run(fmt.Sprintf("%+v", scope), func(t *testing.T) {
			h := newHarness(t)
			h.create("a")
			h.create("b")
			for _, v := range []string{"1", "2", "three"} {
				must(h.UpdateSecrets(ctx, scope, set("K", v), Options{}))(t)
			}
			generation := must(h.Workspace("a"))(t).Generation
			check := func(u SecretsUpdate, changed bool, bumps int64, value, versions string) Result {
				t.Helper()
				h.record.take()
				r := must(h.UpdateSecrets(ctx, scope, u, Options{}))(t)
				generation += bumps
				w := must(h.Workspace("a"))(t)
				if r.Changed != changed || w.Generation != generation || len(h.record.take()) > 0 != (bumps > 0 || changed && !scope.Global()) {
					t.Errorf("changed is %t, generation %d, want %d", r.Changed, w.Generation, generation)
				}
				want := ReasonSecret
				if scope.Global() {
					want = ReasonGlobalSecret
				}
				if bumps > 0 && w.ChangeReason != want {
					t.Errorf("reason %s", w.ChangeReason)
				}
				for _, s := range must(h.Snapshot("a"))(t).Secrets {
					if s.Value.Reveal() != value || s.Version != r.Secrets[0].Version {
						t.Errorf("the container gets %q, version %d; the answer is %+v", s.Value.Reveal(), s.Version, r.Secrets[0])
					}
				}
				if r.Secrets[0].Size != len(value) {
					t.Errorf("size %d", r.Secrets[0].Size)
				}
				h.reopen()
				if got := h.versions(scope, "K"); got != versions {
					t.Errorf("versions %s, want %s", got, versions)
				}
				checkSums(t, h, must(h.owner(scope))(t))
				return r
			}
			check(back("K", 1), true, 1, "1", "4*<1, 3, 2, 1")
			check(back("K", 1), false, 0, "1", "4*<1, 3, 2, 1")
			check(back("K", 4), false, 0, "1", "4*<1, 3, 2, 1")
			check(set("K", "1"), false, 0, "1", "4*<1, 3, 2, 1")
			check(back("K", 3), true, 1, "three", "5*<3, 4<1, 3, 2, 1")
			late := back("K", 2)
			late.NextStart = true
			check(late, true, 0, "2", "6*<2, 5<3, 4<1, 3, 2")
			// Together with others: one change.
			mixed := back("K", 4)
			mixed.Set, mixed.Delete = set("L", "").Set, []string{"M"}
			if _, err := h.UpdateSecrets(ctx, scope, mixed, Options{ValidateOnly: true}); err != nil {
				t.Error(err)
			}
			if _, err := h.UpdateSecrets(ctx, scope, SecretsUpdate{RollBack: &RollBack{"K", 4}, Delete: []string{"K"}}, Options{}); err == nil {
				t.Error("a key comes twice")
			}
			check(set("K", "7"), true, 1, "7", "7*, 6<2, 5<3, 4<1, 3")

			etag := ptr(must(h.Secret(scope, "K"))(t)).Etag()
			r := must(h.UpdateSecrets(ctx, scope, back("K", 6), Options{Etag: etag, RequestID: "r"}))(t)
			if _, err := h.UpdateSecrets(ctx, scope, back("K", 7), Options{Etag: etag}); !errors.Is(err, ErrEtag) {
				t.Errorf("the old etag: got %v", err)
			}
			again := must(h.UpdateSecrets(ctx, scope, back("K", 6), Options{Etag: etag, RequestID: "r"}))(t)
			if diff := cmp.Diff(r, again); diff != "" {
				t.Errorf("the request repeated: %s", diff)
			}
		})
	}
}

// What can't be done changes nothing, and says what is in the way.
func TestVersions_Refused(t *testing.T) {
	setState := func(id, key string, version int64, state VersionState) func(h *harness) error {
		return func(h *harness) error {
			_, err := h.SetVersionState(ctx, Scope{WorkspaceID: id}, key, version, state, Options{})
			return err
		}
	}
	rollBack := func(id, key string, version int64) func(h *harness) error {
		return func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, Scope{WorkspaceID: id}, back(key, version), Options{})
			return err
		}
	}
	list := func(id, key string) func(h *harness) error {
		return func(h *harness) error {
			_, _, err := h.ListSecretVersions(Scope{WorkspaceID: id}, key, 0, 0)
			return err
		}
	}
	for _, test := range []struct {
		name string
		do   func(h *harness) error
		want error
	}{
		{"roll back: no workspace", rollBack("n", "K", 1), &NotFoundError{WorkspaceID: "n"}},
		{"roll back: no secret", rollBack("a", "N", 1), &NotFoundError{WorkspaceID: "a", Key: "N"}},
		{"roll back: deleted secret", rollBack("a", "GONE", 1), &NotFoundError{WorkspaceID: "a", Key: "GONE"}},
		{"roll back: no global secret", rollBack("", "K", 1), &NotFoundError{Key: "K"}},
		{"roll back: to come", rollBack("a", "K", 5), &NotFoundError{WorkspaceID: "a", Key: "K", Version: 5}},
		{"roll back: pruned", rollBack("", "G", 1), &NotFoundError{Key: "G", Version: 1}},
		{"roll back: disabled", rollBack("a", "K", 1), &VersionError{"K", 1, ErrVersionDisabled}},
		{"roll back: destroyed", rollBack("a", "K", 2), &VersionError{"K", 2, ErrVersionDestroyed}},
		{"roll back: deleting", rollBack("deleting", "K", 1), ErrDeleting},
		{"disable: current", setState("a", "K", 4, VersionDisabled), &VersionError{"K", 4, ErrVersionCurrent}},
		{"destroy: current", setState("a", "K", 4, VersionDestroyed), &VersionError{"K", 4, ErrVersionCurrent}},
		{"enable: destroyed", setState("a", "K", 2, VersionEnabled), &VersionError{"K", 2, ErrVersionDestroyed}},
		{"disable: destroyed", setState("a", "K", 2, VersionDisabled), &VersionError{"K", 2, ErrVersionDestroyed}},
		{"enable: no such version", setState("a", "K", 9, VersionEnabled), &NotFoundError{WorkspaceID: "a", Key: "K", Version: 9}},
		{"enable: no secret", setState("a", "GONE", 1, VersionEnabled), &NotFoundError{WorkspaceID: "a", Key: "GONE"}},
		{"enable: no workspace", setState("n", "K", 1, VersionEnabled), &NotFoundError{WorkspaceID: "n"}},
		{"enable: deleting", setState("deleting", "K", 1, VersionEnabled), ErrDeleting},
		{"list: no workspace", list("n", "K"), &NotFoundError{WorkspaceID: "n"}},
		{"list: no secret", list("a", "N"), &NotFoundError{WorkspaceID: "a", Key: "N"}},
		{"list: deleted secret", list("a", "GONE"), &NotFoundError{WorkspaceID: "a", Key: "GONE"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHarness(t)
			h.create("a", value("K", "1"), value("GONE", "1"))
			must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"GONE"}}, Options{}))(t)
			for i := range 6 {
				must(h.UpdateSecrets(ctx, Scope{}, set("G", fmt.Sprint(i)), Options{}))(t)
				if i < 3 {
					must(h.UpdateSecrets(ctx, in("a"), set("K", fmt.Sprint("v", i)), Options{}))(t)
				}
			}
			must(h.SetVersionState(ctx, in("a"), "K", 1, VersionDisabled, Options{}))(t)
			must(h.SetVersionState(ctx, in("a"), "K", 2, VersionDestroyed, Options{}))(t)
			h.create("deleting", value("K", "1"))
			must(h.DeleteWorkspace(ctx, "deleting", false, Options{}))(t)
			before := dump(t, h.db)
			err := test.do(h)
			if (err == nil || err.Error() != test.want.Error()) || fmt.Sprintf("%T", err) != fmt.Sprintf("%T", test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if diff := cmp.Diff(before, dump(t, h.db)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A state is set once, makes no generation, and a version that is enabled again
// can be rolled back to. What is destroyed is nowhere in the rows any more.
func TestSetVersionState(t *testing.T) {
	for _, scope := range []Scope{in("a"), {}} {
		t.Run(fmt.Sprintf("%+v", scope), func(t *testing.T) {
			h := newHarness(t)
			h.create("a")
			for _, v := range []string{"1", "2", "3"} {
				must(h.UpdateSecrets(ctx, scope, set("K", v), Options{}))(t)
			}
			o := must(h.owner(scope))(t)
			before := must(h.Workspace("a"))(t)
			check := func(version int64, state VersionState, changed bool, versions string) {
				t.Helper()
				r := must(h.SetVersionState(ctx, scope, "K", version, state, Options{ValidateOnly: true}))(t)
				if again := must(h.SetVersionState(ctx, scope, "K", version, state, Options{}))(t); r.Changed != changed || !cmp.Equal(r, again) {
					t.Errorf("got %+v, rehearsed %+v", again, r)
				}
				if r.Version.Version != version || r.Version.State != state || r.Version.Key != "K" || r.Version.WorkspaceID != scope.WorkspaceID {
					t.Errorf("got %+v", r.Version)
				}
				if got := h.versions(scope, "K"); got != versions {
					t.Errorf("versions %s, want %s", got, versions)
				}
				checkSums(t, h, o)
			}
			check(1, VersionDisabled, true, "3*, 2, 1 disabled")
			check(1, VersionDisabled, false, "3*, 2, 1 disabled")
			check(1, VersionEnabled, true, "3*, 2, 1")
			check(1, VersionEnabled, false, "3*, 2, 1")
			check(3, VersionEnabled, false, "3*, 2, 1")
			check(2, VersionDisabled, true, "3*, 2 disabled, 1")
			check(2, VersionDestroyed, true, "3*, 2 destroyed, 1")
			check(2, VersionDestroyed, false, "3*, 2 destroyed, 1")
			if _, ok := dump(t, h.db)["sealed"][string(o.value("K", 2))]; ok {
				t.Error("the value is still there")
			}
			if diff := cmp.Diff(before, must(h.Workspace("a"))(t)); diff != "" {
				t.Errorf("the workspace has changed: %s", diff)
			}
			h.reopen()
			must(h.UpdateSecrets(ctx, scope, back("K", 1), Options{}))(t)
			if got := h.versions(scope, "K"); got != "4*<1, 3, 2 destroyed, 1" || h.values("a")["K"] != "1" {
				t.Errorf("versions %s, values %v", got, h.values("a"))
			}
			// A request repeated is answered as it was, and not done again.
			r := must(h.SetVersionState(ctx, scope, "K", 3, VersionDisabled, Options{RequestID: "r"}))(t)
			must(h.SetVersionState(ctx, scope, "K", 3, VersionEnabled, Options{}))(t)
			again := must(h.SetVersionState(ctx, scope, "K", 3, VersionDisabled, Options{RequestID: "r"}))(t)
			if diff := cmp.Diff(r, again); diff != "" || strings.Contains(h.versions(scope, "K"), "disabled") {
				t.Errorf("%s %s", h.versions(scope, "K"), diff)
			}
		})
	}
}

func TestListSecretVersions_Pages(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	for i := range 5 {
		must(h.UpdateSecrets(ctx, in("a"), set("K", strings.Repeat("x", i)), Options{}))(t)
	}
	for _, test := range []struct {
		below int64
		limit int
		want  []int64
		more  bool
	}{
		{0, 0, []int64{5, 4, 3, 2, 1}, false}, {0, 5, []int64{5, 4, 3, 2, 1}, false}, {0, 2, []int64{5, 4}, true},
		{4, 2, []int64{3, 2}, true}, {2, 2, []int64{1}, false}, {1, 2, nil, false}, {0, 4, []int64{5, 4, 3, 2}, true},
	} {
		versions, more, err := h.ListSecretVersions(in("a"), "K", test.below, test.limit)
		var got []int64
		for _, v := range versions {
			got = append(got, v.Version)
			if v.Size != int(v.Version)-1 || v.CreateTime.IsZero() || v.Key != "K" || v.WorkspaceID != "a" || v.Current != (v.Version == 5) {
				t.Errorf("got %+v", v)
			}
		}
		if diff := cmp.Diff(test.want, got); diff != "" || more != test.more || err != nil {
			t.Errorf("%+v: more is %t, %v %s", test, more, err, diff)
		}
	}
}

// As many versions are kept as the configuration says: what is above it goes with
// the next new version, not before.
func TestVersions_AsManyAsConfigured(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	o := must(h.owner(in("a")))(t)
	with := func(versions int) {
		h.close()
		h.cfg.SecretVersions = versions
		h.open()
	}
	n := 0
	check := func(times int, want string) {
		t.Helper()
		for range times {
			n++
			must(h.UpdateSecrets(ctx, in("a"), set("K", fmt.Sprint(n)), Options{}))(t)
		}
		if got := h.versions(in("a"), "K"); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		checkSums(t, h, o)
	}
	check(7, "7*, 6, 5, 4, 3")
	with(2)
	check(0, "7*, 6, 5, 4, 3")
	must(h.SetVersionState(ctx, in("a"), "K", 5, VersionDisabled, Options{}))(t)
	check(0, "7*, 6, 5 disabled, 4, 3")
	check(1, "8*, 7")
	with(1)
	check(2, "10*")
	with(3)
	check(3, "13*, 12, 11")
	with(MaxSecretVersions)
	check(100, "113*, "+strings.Join(countdown(112, 14), ", "))
	for _, versions := range []int{-1, MaxSecretVersions + 1} {
		cfg := h.cfg
		cfg.SecretVersions = versions
		if s, err := Open(cfg); err == nil {
			_ = s.Close()
			t.Errorf("%d versions are accepted", versions)
		}
	}
}

func countdown(from, to int) (words []string) {
	for ; from >= to; from-- {
		words = append(words, fmt.Sprint(from))
	}
	return words
}

// Nothing of a deleted key, or workspace, is left but the number of its last
// version; a key that is set again has no older versions.
func TestVersions_GoWithTheirSecret(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("K", "1"))
	must(h.UpdateSecrets(ctx, in("a"), set("K", "2", "KEY", "1"), Options{}))(t)
	must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"K"}}, Options{}))(t)
	if rows := dump(t, h.db)["sealed"]; len(rows) != 1 {
		t.Errorf("%d values are left", len(rows))
	}
	must(h.UpdateSecrets(ctx, in("a"), set("K", "3"), Options{}))(t)
	if got := h.versions(in("a"), "K"); got != "3*" {
		t.Errorf("versions %s", got)
	}
	if _, err := h.UpdateSecrets(ctx, in("a"), back("K", 2), Options{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	must(h.UpdateSecrets(ctx, in("a"), set("K", "4", "KEY", "2"), Options{}))(t)
	h.remove("a")
	if rows := dump(t, h.db); len(rows["sealed"])+len(rows["secrets"]) != 0 {
		t.Errorf("%d values are left", len(rows["sealed"]))
	}
}

// Only current values count for the limit, and a rollback is held to it.
func TestRollBack_Quota(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	full := strings.Repeat("x", MaxValueBytes)
	var all SecretsUpdate
	for i := range MaxWorkspaceBytes / MaxValueBytes {
		all.Set = append(all.Set, value(fmt.Sprint("K", i), full))
	}
	must(h.UpdateSecrets(ctx, in("a"), all, Options{}))(t)
	must(h.UpdateSecrets(ctx, in("a"), set("K0", "", "MORE", full), Options{}))(t)
	_, err := h.UpdateSecrets(ctx, in("a"), back("K0", 1), Options{})
	if want := (&QuotaError{in("a"), MaxWorkspaceBytes, MaxWorkspaceBytes + MaxValueBytes}); !cmp.Equal(err, error(want)) {
		t.Errorf("got %v, want %v", err, want)
	}
	must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"MORE"}, RollBack: &RollBack{"K0", 1}}, Options{}))(t)
	if h.values("a")["K0"] != full {
		t.Error("not rolled back")
	}
}

// An old value that is damaged, or another one's, can't be rolled back to; the
// current one that is lost comes back by a rollback.
func TestRollBack_Unreadable(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("K", "1"), value("L", "1"))
	must(h.UpdateSecrets(ctx, in("a"), set("K", "2", "L", "2"), Options{}))(t)
	must(h.UpdateSecrets(ctx, in("a"), set("K", "3"), Options{}))(t)
	o := must(h.owner(in("a")))(t)
	for name, tamper := range map[string]func(*bolt.Tx) error{
		"garbage":         func(tx *bolt.Tx) error { return tx.Bucket(bucketSealed).Put(o.value("K", 1), []byte("x")) },
		"another version": func(tx *bolt.Tx) error { return copyRow(tx, bucketSealed, o.value("K", 2), o.value("K", 1)) },
		"another key":     func(tx *bolt.Tx) error { return copyRow(tx, bucketSealed, o.value("L", 1), o.value("K", 1)) },
		"lost":            func(tx *bolt.Tx) error { return tx.Bucket(bucketSealed).Delete(o.value("K", 1)) },
	} {
		h.edit(tamper)
		h.reopen()
		_, err := h.UpdateSecrets(ctx, in("a"), back("K", 1), Options{})
		if want := error(&VersionError{"K", 1, ErrUnreadable}); err == nil || err.Error() != want.Error() || !errors.Is(err, ErrUnreadable) {
			t.Errorf("%s: got %v, want %v", name, err, want)
		}
		if diff := cmp.Diff(map[string]string{"K": "3", "L": "2"}, h.values("a")); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketSealed).Delete(o.value("K", 3)) })
	h.reopen()
	var key *KeyError
	if _, err := h.Snapshot("a"); !errors.As(err, &key) || key.Key != "K" {
		t.Errorf("the current value is lost: got %v", err)
	}
	must(h.UpdateSecrets(ctx, in("a"), back("K", 2), Options{}))(t)
	if got := h.versions(in("a"), "K"); got != "4*<2, 3, 2, 1" || h.values("a")["K"] != "2" {
		t.Errorf("versions %s, values %v", got, h.values("a"))
	}
}

// Of a secret whose row is damaged nobody knows which versions are disabled: they
// go when it is set anew.
func TestVersions_DamagedRow(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("K", "1"))
	must(h.UpdateSecrets(ctx, in("a"), set("K", "2"), Options{}))(t)
	must(h.SetVersionState(ctx, in("a"), "K", 1, VersionDisabled, Options{}))(t)
	o := must(h.owner(in("a")))(t)
	for _, row := range []string{
		"x", `{"version":2,"size":1,"older":[{"version":2}]}`, `{"version":2,"size":1,"older":[{"version":0}]}`,
		`{"version":2,"size":1,"older":[{"version":1,"state":"SOMETHING"}]}`, `{"version":2,"size":1,"older":[{"version":1,"size":-1}]}`,
		`{"version":3,"size":1,"older":[{"version":1},{"version":2}]}`,
	} {
		h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketSecrets).Put(o.row("K"), []byte(row)) })
		h.reopen()
		want := &KeyError{Key: "K", Err: ErrUnreadable}
		for name, do := range map[string]func() error{
			"list":      func() error { _, _, err := h.ListSecretVersions(in("a"), "K", 0, 0); return err },
			"state":     func() error { _, err := h.SetVersionState(ctx, in("a"), "K", 1, VersionEnabled, Options{}); return err },
			"roll back": func() error { _, err := h.UpdateSecrets(ctx, in("a"), back("K", 1), Options{}); return err },
		} {
			if err := do(); err == nil || err.Error() != want.Error() {
				t.Errorf("%s: %s: got %v", row, name, err)
			}
		}
	}
	must(h.UpdateSecrets(ctx, in("a"), set("K", "3"), Options{}))(t)
	if got := h.versions(in("a"), "K"); strings.Contains(got, ",") || h.values("a")["K"] != "3" {
		t.Errorf("versions %s, values %v", got, h.values("a"))
	}
	checkSums(t, h, o)
}

// A rollback of a global secret reaches a large fleet as any change of one does.
func TestRollBack_RolledOut(t *testing.T) {
	h := newHarness(t)
	for i := range 3 {
		h.create(fmt.Sprint("w", i))
	}
	must(h.UpdateSecrets(ctx, Scope{}, set("G", "1"), Options{}))(t)
	must(h.UpdateSecrets(ctx, Scope{}, set("G", "2"), Options{}))(t)
	steps := newSteps(h, 1, 1)
	r := must(h.UpdateSecrets(ctx, Scope{}, back("G", 1), Options{}))(t)
	if !r.Changed || r.Affected != 3 || len(dump(t, h.db)["rollouts"]) != 1 {
		t.Errorf("got %+v", r)
	}
	check := func() {
		t.Helper()
		for i := range 3 {
			s := must(h.Snapshot(fmt.Sprint("w", i)))(t)
			if s.Workspace.Generation != 4 || s.Secrets[0].Version != 3 || s.Secrets[0].Value.Reveal() != "1" {
				t.Errorf("w%d has generation %d, version %d", i, s.Workspace.Generation, s.Secrets[0].Version)
			}
		}
	}
	check()
	for steps.step(h) {
		check()
	}
	if n := len(dump(t, h.db)["rollouts"]); n != 0 {
		t.Errorf("%d rollouts are left", n)
	}
}

// The migration to version 8: also of a secret whose row can't be read, which
// stays one that can be set anew.
func TestMigrate_ValuesOfDamagedRows(t *testing.T) {
	h := newHarness(t)
	w := h.create("a", value("K", "1"), value("L", "2"))
	o := ownerOf(&w)
	h.close()
	editFile(t, h.cfg.Path, func(tx *bolt.Tx) error {
		sealed := tx.Bucket(bucketSealed)
		for _, key := range []string{"K", "L"} {
			if err := errors.Join(copyRow(tx, bucketSealed, o.value(key, 1), o.row(key)), sealed.Delete(o.value(key, 1))); err != nil {
				return err
			}
		}
		return errors.Join(tx.Bucket(bucketSecrets).Put(o.row("K"), []byte(`{"version":7,"size":-1}`)), nameValues(tx, nil))
	})
	h.open()
	var key *KeyError
	if _, err := h.Snapshot("a"); !errors.As(err, &key) || key.Key != "K" {
		t.Errorf("got %v", err)
	}
	must(h.UpdateSecrets(ctx, in("a"), set("K", "3"), Options{}))(t)
	if diff := cmp.Diff(map[string]string{"K": "3", "L": "2"}, h.values("a")); diff != "" {
		t.Error(diff)
	}
	checkSums(t, h, o)
}
