package store

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

func ptr[T any](v T) *T { return &v }

// edits for UpdateWorkspace.
func setSpec(f func(*Spec)) func(*Editable) error {
	return func(e *Editable) error { f(&e.Spec); return nil }
}

// effect is what a change did to a workspace's record.
type effect struct {
	Changed        bool
	Generation     int64 // how much it grew
	SpecGeneration bool  // it is the new one
	Reason         ChangeReason
	Etag           bool // another one
	UpdateTime     bool // later
	Revision       bool // newer
	Desired        bool // told to the actor
	Interrupt      bool
}

// Every change of one workspace, on a workspace that runs its generation.
func TestContract10_EqualIsEqual(t *testing.T) {
	const id = "a"
	change := func(r ChangeReason) effect {
		return effect{Changed: true, Generation: 1, Reason: r, UpdateTime: true, Revision: true, Desired: true}
	}
	spec := change(ReasonSpec)
	spec.SpecGeneration, spec.Etag = true, true
	model := change(ReasonModel)
	model.Etag = true
	start := change(ReasonStart)
	start.Etag = true
	recordOnly := effect{Changed: true, Etag: true, UpdateTime: true, Revision: true}
	told := recordOnly
	told.Desired = true
	interrupt := told
	interrupt.Interrupt = true
	silent := effect{Changed: true, UpdateTime: true, Revision: true}
	var nothing effect

	update := func(edit func(*Editable) error) func(*harness) (Result, error) {
		return func(h *harness) (Result, error) { return h.UpdateWorkspace(ctx, id, edit, Options{}) }
	}
	secrets := func(u SecretsUpdate) func(*harness) (Result, error) {
		return func(h *harness) (Result, error) { return h.UpdateSecrets(ctx, in(id), u, Options{}) }
	}
	global := func(u SecretsUpdate) func(*harness) (Result, error) {
		return func(h *harness) (Result, error) { return h.UpdateSecrets(ctx, Scope{}, u, Options{}) }
	}
	park := func(h *harness) { must(h.StopWorkspace(ctx, id, Options{}))(h.t) }
	del := func(keep bool) func(*harness) {
		return func(h *harness) { must(h.DeleteWorkspace(ctx, id, keep, Options{}))(h.t) }
	}
	later := func(scope Scope, u SecretsUpdate) func(*harness) {
		u.NextStart = true
		return func(h *harness) { must(h.UpdateSecrets(ctx, scope, u, Options{}))(h.t) }
	}
	tests := []struct {
		name   string
		before func(*harness)
		do     func(*harness) (Result, error)
		want   effect
	}{
		{"update: nothing", nil, update(func(*Editable) error { return nil }), nothing},
		{"update: same values, empty for nil", nil, update(func(e *Editable) error {
			e.Labels = map[string]string{"l": "1"}
			e.Spec = Spec{
				Image: "img", Command: []string{"c"}, Args: []string{}, Env: map[string]string{},
				Volumes: []Volume{}, ModelEnv: []string{}, StopGrace: ptr(time.Second),
			}
			return nil
		}), nothing},
		{"update: labels", nil, update(func(e *Editable) error { e.Labels["l"] = "2"; return nil }), recordOnly},
		{"update: no labels", nil, update(func(e *Editable) error { e.Labels = nil; return nil }), recordOnly},
		{"update: image", nil, update(setSpec(func(s *Spec) { s.Image = "img2" })), spec},
		{"update: command", nil, update(setSpec(func(s *Spec) { s.Command[0] = "d" })), spec},
		{"update: args", nil, update(setSpec(func(s *Spec) { s.Args = []string{"d"} })), spec},
		{"update: env", nil, update(setSpec(func(s *Spec) { s.Env = map[string]string{"E": "1"} })), spec},
		{"update: working dir", nil, update(setSpec(func(s *Spec) { s.WorkingDir = "/" })), spec},
		{"update: user", nil, update(setSpec(func(s *Spec) { s.User = "u" })), spec},
		{"update: resources", nil, update(setSpec(func(s *Spec) { s.Resources.Pids = 5 })), spec},
		{"update: volumes", nil, update(setSpec(func(s *Spec) { s.Volumes = []Volume{{MountPath: "/m", Name: "v"}} })), spec},
		{"update: read-only root", nil, update(setSpec(func(s *Spec) { s.ReadOnlyRoot = true })), spec},
		{"update: model env", nil, update(setSpec(func(s *Spec) { s.ModelEnv = []string{"M"} })), spec},
		{"update: secret delivery", nil, update(setSpec(func(s *Spec) { s.SecretDelivery = DeliveryFiles })), spec},
		{"update: secret delivery that is the default", nil, update(setSpec(func(s *Spec) { s.SecretDelivery = DeliveryEnv })), told},
		{"update: model env that is the default", nil,
			update(setSpec(func(s *Spec) { s.ModelEnv = []string{DefaultModelEnv} })), told},
		{"update: stop signal", nil, update(setSpec(func(s *Spec) { s.StopSignal = "SIGINT" })), told},
		{"update: stop grace", nil, update(setSpec(func(s *Spec) { s.StopGrace = ptr(2 * time.Second) })), told},
		{"update: no stop grace", nil, update(setSpec(func(s *Spec) { s.StopGrace = nil })), told},
		{"update: model", nil, update(func(e *Editable) error { e.Model = "m2"; return nil }), model},
		{"update: model and spec", nil, update(func(e *Editable) error {
			e.Model, e.Spec.Image = "m2", "img2"
			return nil
		}), spec},
		{"update: parked", park, update(func(e *Editable) error { e.Model = "m2"; return nil }), model},
		{"restart", nil, func(h *harness) (Result, error) { return h.RestartWorkspace(ctx, id, Options{}) }, change(ReasonRestart)},
		{"stop", nil, func(h *harness) (Result, error) { return h.StopWorkspace(ctx, id, Options{}) }, interrupt},
		{"stop: parked", park, func(h *harness) (Result, error) { return h.StopWorkspace(ctx, id, Options{}) }, nothing},
		{"start", nil, func(h *harness) (Result, error) { return h.StartWorkspace(ctx, id, Options{}) }, nothing},
		{"start: parked", park, func(h *harness) (Result, error) { return h.StartWorkspace(ctx, id, Options{}) }, start},
		{"delete", nil, func(h *harness) (Result, error) { return h.DeleteWorkspace(ctx, id, true, Options{}) }, interrupt},
		{"delete: again", del(false), func(h *harness) (Result, error) { return h.DeleteWorkspace(ctx, id, false, Options{}) }, nothing},
		{"delete: keep the volumes, too late", del(false),
			func(h *harness) (Result, error) { return h.DeleteWorkspace(ctx, id, true, Options{}) }, nothing},
		{"delete: don't keep them after all", del(true),
			func(h *harness) (Result, error) { return h.DeleteWorkspace(ctx, id, false, Options{}) }, interrupt},
		{"secret: new", nil, secrets(set("N", "1")), change(ReasonSecret)},
		{"secret: new, empty", nil, secrets(set("N", "")), change(ReasonSecret)},
		{"secret: other value", nil, secrets(set("K", "other")), change(ReasonSecret)},
		{"secret: same value", nil, secrets(set("K", "own")), nothing},
		{"secret: same and other", nil, secrets(set("K", "own", "L", "2")), change(ReasonSecret)},
		{"secret: delete", nil, secrets(SecretsUpdate{Delete: []string{"K"}}), change(ReasonSecret)},
		{"secret: delete what is not there", nil, secrets(SecretsUpdate{Delete: []string{"N"}}), nothing},
		{"secret: nothing", nil, secrets(SecretsUpdate{}), nothing},
		{"secret: next start", nil, secrets(SecretsUpdate{Set: set("K", "2").Set, NextStart: true}), silent},
		{"secret: delete, next start", nil, secrets(SecretsUpdate{Delete: []string{"K"}, NextStart: true}), silent},
		{"secret: same value, next start", nil, secrets(SecretsUpdate{Set: set("K", "own").Set, NextStart: true}), nothing},
		{"secret: other delivery", nil, secrets(as(DeliveryFiles, "K", "own")), change(ReasonSecret)},
		{"secret: same delivery", nil, secrets(as(DeliverySpec, "K", "own")), nothing},
		{"secret: staged, then now", later(in(id), set("K", "2")), secrets(set("K", "2")), change(ReasonSecret)},
		{"secret: staged, then next start", later(in(id), set("K", "2")), secrets(SecretsUpdate{Set: set("K", "2").Set, NextStart: true}), nothing},
		{"secret: staged deletion, then now", later(in(id), SecretsUpdate{Delete: []string{"K"}}),
			secrets(SecretsUpdate{Delete: []string{"K"}, MustExist: true}), change(ReasonSecret)},
		{"secret: staged deletion, then next start", later(in(id), SecretsUpdate{Delete: []string{"K"}}),
			secrets(SecretsUpdate{Delete: []string{"K"}, NextStart: true}), nothing},
		{"secret: live", nil, secrets(rotated("F", "1")), change(ReasonSecret)},
		{"secret: live, same", func(h *harness) { must(h.UpdateSecrets(ctx, in(id), rotated("F", "1"), Options{}))(h.t) }, secrets(rotated("F", "1")), nothing},
		{"global: live", nil, global(rotated("F", "1")), change(ReasonGlobalSecret)},
		{"update: live signal", nil, update(setSpec(func(s *Spec) { s.LiveSignal = "SIGHUP" })), told},
		{"secret: parked", park, secrets(set("K", "2")), change(ReasonSecret)},
		{"global: new", nil, global(set("N", "1")), change(ReasonGlobalSecret)},
		{"global: other value", nil, global(set("G", "2")), change(ReasonGlobalSecret)},
		{"global: same value", nil, global(set("G", "global")), nothing},
		{"global: delete", nil, global(SecretsUpdate{Delete: []string{"G"}}), change(ReasonGlobalSecret)},
		{"global: delete what is not there", nil, global(SecretsUpdate{Delete: []string{"N"}}), nothing},
		{"global: hidden by an own one", nil, global(set("K", "2")), effect{Changed: true}},
		{"global: two, one is hidden", nil, global(set("K", "2", "G", "2")), change(ReasonGlobalSecret)},
		{"global: two, the visible one is the same", nil, global(set("K", "2", "G", "global")), effect{Changed: true}},
		{"global: next start", nil, global(SecretsUpdate{Set: set("G", "2").Set, NextStart: true}), effect{Changed: true}},
		{"global: staged, then now", later(Scope{}, set("G", "2")), global(set("G", "2")), change(ReasonGlobalSecret)},
		{"global: staged deletion, then now", later(Scope{}, SecretsUpdate{Delete: []string{"G"}}),
			global(SecretsUpdate{Delete: []string{"G"}}), change(ReasonGlobalSecret)},
		{"global: other delivery", nil, global(as(DeliveryFiles, "G", "global")), change(ReasonGlobalSecret)},
		{"global: parked", park, global(set("G", "2")), change(ReasonGlobalSecret)},
		{"global: deleting", del(false), global(set("G", "2")), effect{Changed: true}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHarness(t)
			must(h.CreateWorkspace(ctx, NewWorkspace{
				ID: id, Labels: map[string]string{"l": "1"}, Model: "m",
				Spec:    Spec{Image: "img", Command: []string{"c"}, StopGrace: ptr(time.Second)},
				Secrets: []SecretValue{value("K", "own")},
			}, Options{}))(t)
			must(h.UpdateSecrets(ctx, Scope{}, set("G", "global", "K", "hidden"), Options{}))(t)
			if test.before != nil {
				test.before(h)
			}
			before := must(h.Workspace(id))(t)
			w := must(h.UpdateStatus(ctx, id, before.UID, func(w Workspace, st *Status) { st.ObservedGeneration = w.Generation }))(t)
			if !w.PendingSince.IsZero() {
				t.Fatal("it is pending")
			}
			h.record.take()

			r, err := test.do(h)
			if err != nil {
				t.Fatal(err)
			}

			after := must(h.Workspace(id))(t)
			changes := h.record.take()
			got := effect{
				Changed:        r.Changed,
				Generation:     after.Generation - w.Generation,
				SpecGeneration: after.SpecGeneration == after.Generation && after.Generation != w.Generation,
				Etag:           after.Etag() != w.Etag(),
				UpdateTime:     after.UpdateTime.After(w.UpdateTime),
				Revision:       after.Revision > w.Revision,
			}
			if after.Generation != w.Generation {
				got.Reason = after.ChangeReason
			}
			for _, c := range changes {
				got.Desired, got.Interrupt = c.Desired, c.Interrupt
				if want := (Change{ID: id, UID: after.UID, Revision: after.Revision, Desired: c.Desired, Interrupt: c.Interrupt}); c != want {
					t.Errorf("told %+v, want %+v", c, want)
				}
			}
			if len(changes) > 1 || (len(changes) == 1) != got.Revision {
				t.Errorf("told %+v", changes)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
			if r.Workspace.ID != "" { // not of a global secret
				if diff := cmp.Diff(after, r.Workspace); diff != "" {
					t.Errorf("the result is not what is stored: %s", diff)
				}
			}
			if pending := !after.PendingSince.IsZero(); pending != (got.Generation > 0) {
				t.Errorf("pending since %v", after.PendingSince)
			}
			if want := int(got.Generation); r.Affected != want {
				t.Errorf("affected %d, want %d", r.Affected, want)
			}
			if h.Revision() != after.Revision {
				t.Errorf("revision is %d, want %d", h.Revision(), after.Revision)
			}
		})
	}
}

func TestCreateWorkspace(t *testing.T) {
	h := newHarness(t)
	n := NewWorkspace{
		ID: "a", Labels: map[string]string{}, Model: "m",
		Spec: Spec{
			Image: "img", Command: []string{}, Args: []string{"x"}, Env: map[string]string{"E": "1"},
			Volumes: []Volume{{MountPath: "/m", Name: "v"}}, ModelEnv: []string{"M"}, StopGrace: ptr(time.Minute),
		},
		Secrets: []SecretValue{value("B", "2"), value("A", "")},
	}
	r := must(h.CreateWorkspace(ctx, n, Options{}))(t)
	now := r.Workspace.CreateTime
	want := Workspace{
		ID: "a", UID: r.Workspace.UID, Model: "m",
		Spec: Spec{
			Image: "img", Args: []string{"x"}, Env: map[string]string{"E": "1"},
			Volumes: []Volume{{MountPath: "/m", Name: "v"}}, ModelEnv: []string{"M"}, StopGrace: ptr(time.Minute),
		},
		Generation: 1, SpecGeneration: 1, ChangeReason: ReasonCreated,
		PendingSince: now, CreateTime: now, UpdateTime: now, ConfigRevision: 1, Revision: 1,
	}
	if diff := cmp.Diff(want, r.Workspace); diff != "" {
		t.Error(diff)
	}
	if len(r.Workspace.UID) != 36 || now.IsZero() || !want.Pending() {
		t.Errorf("uid %q, time %v", r.Workspace.UID, now)
	}
	if diff := cmp.Diff(want, must(h.Workspace("a"))(t)); diff != "" {
		t.Error(diff)
	}
	secrets := []Secret{
		{Key: "B", WorkspaceID: "a", Version: 1, Size: 1, CreateTime: now, UpdateTime: now, Delivery: DeliverySpec},
		{Key: "A", WorkspaceID: "a", Version: 1, Size: 0, CreateTime: now, UpdateTime: now, Delivery: DeliverySpec},
	}
	if diff := cmp.Diff(secrets, r.Secrets); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{"A": "", "B": "2"}, h.values("a")); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]Change{{ID: "a", UID: want.UID, Revision: 1, Desired: true}}, h.record.take()); diff != "" {
		t.Error(diff)
	}

	// What the caller does with its maps and slices afterwards changes nothing.
	n.Spec.Env["E"], n.Spec.Args[0], *n.Spec.StopGrace = "2", "y", 0
	r.Workspace.Spec.Env["E"] = "3"
	if diff := cmp.Diff(want, must(h.Workspace("a"))(t)); diff != "" {
		t.Error(diff)
	}

	must(h.DeleteWorkspace(ctx, "a", false, Options{}))(t)
	if _, err := h.CreateWorkspace(ctx, n, Options{}); !errors.Is(err, ErrExists) {
		t.Errorf("while the old one is being deleted: got %v", err)
	}
}

// Every change that has to be refused, and that it changes nothing.
func TestChanges_Refused(t *testing.T) {
	const stale = `"stale"`
	errEdit := errors.New("edit says no")
	big := value("N", string(make([]byte, MaxValueBytes+1)))
	tests := []struct {
		name string
		do   func(*harness) error
		want error
	}{
		{"create: exists", func(h *harness) error {
			_, err := h.CreateWorkspace(ctx, NewWorkspace{ID: "a"}, Options{})
			return err
		}, ErrExists},
		{"create: model key", func(h *harness) error {
			_, err := h.CreateWorkspace(ctx, NewWorkspace{ID: "n", Secrets: []SecretValue{value(DefaultModelEnv, "1")}}, Options{})
			return err
		}, &KeyError{DefaultModelEnv, ErrModelKey}},
		{"create: own model key", func(h *harness) error {
			_, err := h.CreateWorkspace(ctx, NewWorkspace{
				ID: "n", Spec: Spec{ModelEnv: []string{"L", "M"}}, Secrets: []SecretValue{value("M", "1")},
			}, Options{})
			return err
		}, &KeyError{"M", ErrModelKey}},
		{"create: value too large", func(h *harness) error {
			_, err := h.CreateWorkspace(ctx, NewWorkspace{ID: "n", Secrets: []SecretValue{big}}, Options{})
			return err
		}, &QuotaError{in("n"), MaxValueBytes, MaxValueBytes + 1}},
		{"update: missing", func(h *harness) error {
			_, err := h.UpdateWorkspace(ctx, "n", func(*Editable) error { return nil }, Options{})
			return err
		}, &NotFoundError{WorkspaceID: "n"}},
		{"update: etag", func(h *harness) error {
			_, err := h.UpdateWorkspace(ctx, "a", func(*Editable) error { return nil }, Options{Etag: stale})
			return err
		}, ErrEtag},
		{"update: deleting", func(h *harness) error {
			_, err := h.UpdateWorkspace(ctx, "gone", func(*Editable) error { return nil }, Options{})
			return err
		}, ErrDeleting},
		{"update: edit", func(h *harness) error {
			_, err := h.UpdateWorkspace(ctx, "a", func(e *Editable) error {
				e.Spec.Command[0], e.Labels["l"] = "changed", "changed"
				return errEdit
			}, Options{})
			return err
		}, errEdit},
		{"update: model key is a secret's", func(h *harness) error {
			_, err := h.UpdateWorkspace(ctx, "a", setSpec(func(s *Spec) { s.ModelEnv = []string{"M", "K"} }), Options{})
			return err
		}, &KeyError{"K", ErrModelKey}},
		{"delete: missing", func(h *harness) error {
			_, err := h.DeleteWorkspace(ctx, "n", false, Options{})
			return err
		}, &NotFoundError{WorkspaceID: "n"}},
		{"delete: etag", func(h *harness) error {
			_, err := h.DeleteWorkspace(ctx, "a", false, Options{Etag: stale})
			return err
		}, ErrEtag},
		{"restart: missing", func(h *harness) error {
			_, err := h.RestartWorkspace(ctx, "n", Options{})
			return err
		}, &NotFoundError{WorkspaceID: "n"}},
		{"restart: parked", func(h *harness) error {
			_, err := h.RestartWorkspace(ctx, "parked", Options{})
			return err
		}, ErrParked},
		{"restart: deleting", func(h *harness) error {
			_, err := h.RestartWorkspace(ctx, "gone", Options{})
			return err
		}, ErrDeleting},
		{"stop: missing", func(h *harness) error {
			_, err := h.StopWorkspace(ctx, "n", Options{})
			return err
		}, &NotFoundError{WorkspaceID: "n"}},
		{"stop: deleting", func(h *harness) error {
			_, err := h.StopWorkspace(ctx, "gone", Options{})
			return err
		}, ErrDeleting},
		{"start: missing", func(h *harness) error {
			_, err := h.StartWorkspace(ctx, "n", Options{})
			return err
		}, &NotFoundError{WorkspaceID: "n"}},
		{"start: deleting", func(h *harness) error {
			_, err := h.StartWorkspace(ctx, "gone", Options{})
			return err
		}, ErrDeleting},
		{"secrets: missing workspace", func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, in("n"), set("K", "2"), Options{})
			return err
		}, &NotFoundError{WorkspaceID: "n"}},
		{"secrets: deleting", func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, in("gone"), set("K", "2"), Options{})
			return err
		}, ErrDeleting},
		{"secrets: model key", func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, in("a"), set("K", "2", DefaultModelEnv, "1"), Options{})
			return err
		}, &KeyError{DefaultModelEnv, ErrModelKey}},
		{"secrets: etag", func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, in("a"), set("K", "2"), Options{Etag: stale})
			return err
		}, ErrEtag},
		{"secrets: etag of one that is not there", func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, in("a"), set("N", "2"), Options{Etag: `"v0"`})
			return err
		}, ErrEtag},
		{"secrets: etag, delete", func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"K"}}, Options{Etag: stale})
			return err
		}, ErrEtag},
		{"secrets: etag, same value", func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, in("a"), set("K", "own"), Options{Etag: stale})
			return err
		}, ErrEtag},
		{"secrets: must exist", func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Set: set("K", "2").Set, Delete: []string{"N"}, MustExist: true}, Options{})
			return err
		}, &NotFoundError{WorkspaceID: "a", Key: "N"}},
		{"secrets: must exist, global", func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, Scope{}, SecretsUpdate{Delete: []string{"N"}, MustExist: true}, Options{})
			return err
		}, &NotFoundError{Key: "N"}},
		{"secrets: value too large", func(h *harness) error {
			_, err := h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Set: []SecretValue{value("K", "2"), big}}, Options{})
			return err
		}, &QuotaError{in("a"), MaxValueBytes, MaxValueBytes + 1}},
		{"status: missing", func(h *harness) error {
			_, err := h.UpdateStatus(ctx, "n", "u", func(_ Workspace, st *Status) { st.Starts++ })
			return err
		}, &NotFoundError{WorkspaceID: "n"}},
		{"status: another uid", func(h *harness) error {
			_, err := h.UpdateStatus(ctx, "a", "u", func(_ Workspace, st *Status) { st.Starts++ })
			return err
		}, &NotFoundError{WorkspaceID: "a"}},
	}
	h := newHarness(t)
	must(h.CreateWorkspace(ctx, NewWorkspace{
		ID: "a", Labels: map[string]string{"l": "1"}, Spec: Spec{Image: "img", Command: []string{"c"}},
		Secrets: []SecretValue{value("K", "own")},
	}, Options{}))(t)
	h.create("parked")
	must(h.StopWorkspace(ctx, "parked", Options{}))(t)
	h.create("gone")
	must(h.DeleteWorkspace(ctx, "gone", false, Options{}))(t)
	h.record.take()
	before, commits := dump(t, h.db), h.ended()
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			err := test.do(h)
			if err == nil || !errors.Is(err, test.want) && fmt.Sprintf("%#v", err) != fmt.Sprintf("%#v", test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if diff := cmp.Diff(before, dump(t, h.db)); diff != "" {
				t.Errorf("the database changed: %s", diff)
			}
			if changes := h.record.take(); len(changes) > 0 || h.ended() != commits {
				t.Errorf("told %+v", changes)
			}
		})
	}
}

func TestErrors_Is(t *testing.T) {
	for _, test := range []struct {
		err, want error
		text      string
	}{
		{&NotFoundError{WorkspaceID: "a"}, ErrNotFound, `workspace "a" not found`},
		{&NotFoundError{WorkspaceID: "a", Key: "K"}, ErrNotFound, `secret "K" of workspace "a" not found`},
		{&NotFoundError{Key: "K"}, ErrNotFound, `global secret "K" not found`},
		{&KeyError{"K", ErrModelKey}, ErrModelKey, `secret "K": key carries the model`},
		{&KeyError{"K", ErrUnreadable}, ErrUnreadable, `secret "K": secret can't be opened`},
		{&QuotaError{Limit: 5, Size: 6}, ErrTooLarge, "secrets would take 6 bytes, the limit is 5"},
		{&OpenError{"f", ErrLocked, "is in use"}, ErrLocked, "database f is in use"},
	} {
		if !errors.Is(test.err, test.want) || test.err.Error() != test.text {
			t.Errorf("%T: %v", test.err, test.err)
		}
	}
}

func TestUpdateWorkspace_EtagOfLastResult(t *testing.T) {
	h := newHarness(t)
	etag := ptr(h.create("a")).Etag()
	for i := range 3 {
		// Status and secrets leave the etag alone.
		must(h.UpdateSecrets(ctx, in("a"), set("K", fmt.Sprint(i)), Options{}))(t)
		must(h.RestartWorkspace(ctx, "a", Options{Etag: etag}))(t)
		r := must(h.UpdateWorkspace(ctx, "a", func(e *Editable) error { e.Model = fmt.Sprint(i); return nil }, Options{Etag: etag}))(t)
		if r.Workspace.Etag() == etag {
			t.Fatal("the etag is the same after a change")
		}
		if _, err := h.StopWorkspace(ctx, "a", Options{Etag: etag}); !errors.Is(err, ErrEtag) {
			t.Errorf("the old etag: got %v", err)
		}
		etag = r.Workspace.Etag()
	}
}

func TestUpdateStatus(t *testing.T) {
	h := newHarness(t)
	created := h.create("a")
	local := time.FixedZone("local", 3600)
	status := Status{
		ObservedGeneration: 1, StartingGeneration: 2, RestartCount: 3, Starts: 4,
		Running: &Running{
			InstanceID: "i", PID: 5, ImageDigest: "d", StartTime: time.Date(2026, 1, 1, 1, 0, 0, 7, local),
			SecretVersions: map[string]int64{"K": 1},
		},
		LastGood: &LastGood{Generation: 1, Spec: Spec{Image: "img", Env: map[string]string{"E": "1"}}},
		LastExit: &Exit{Code: 137, Known: true, Signal: 9, OOMKilled: true, Time: time.Now()},
		Failure:  &Failure{Generation: 2, Reason: "R", Message: "m", Attempt: 1, Time: time.Now(), NextAttempt: time.Now().Add(time.Hour)},
	}
	h.record.take()
	w := must(h.UpdateStatus(ctx, "a", created.UID, func(w Workspace, st *Status) {
		if diff := cmp.Diff(created, w); diff != "" {
			t.Error(diff)
		}
		w.Spec.Image = "not mine to change"
		*st = status
	}))(t)
	want := created
	want.Status, want.PendingSince, want.Revision = status, time.Time{}, 2
	if diff := cmp.Diff(want, w); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(w, must(h.Workspace("a"))(t)); diff != "" {
		t.Errorf("the result is not what is stored: %s", diff)
	}
	if diff := cmp.Diff([]Change{{ID: "a", UID: w.UID, Revision: 2}}, h.record.take()); diff != "" {
		t.Error(diff)
	}
	status.Running.SecretVersions["K"], status.LastGood.Spec.Env["E"] = 9, "9"
	if diff := cmp.Diff(w, must(h.Workspace("a"))(t)); diff != "" {
		t.Errorf("the store shares memory with its caller: %s", diff)
	}

	// The same again, in another time zone, writes nothing.
	commits := h.ended()
	again := must(h.UpdateStatus(ctx, "a", created.UID, func(_ Workspace, st *Status) {
		st.Running.StartTime = st.Running.StartTime.In(local)
		st.Failure.Time = st.Failure.Time.Local()
	}))(t)
	if diff := cmp.Diff(w, again); diff != "" || h.ended() != commits || h.record.take() != nil {
		t.Errorf("something was written: %s", diff)
	}
}

func TestUpdateStatus_PendingSince(t *testing.T) {
	h := newHarness(t)
	created := h.create("a")
	first := created.PendingSince
	restart := func() Workspace {
		t.Helper()
		return must(h.RestartWorkspace(ctx, "a", Options{}))(t).Workspace
	}
	observe := func(generation int64) Workspace {
		t.Helper()
		return must(h.UpdateStatus(ctx, "a", created.UID, func(_ Workspace, st *Status) { st.ObservedGeneration = generation }))(t)
	}
	if w := restart(); !w.PendingSince.Equal(first) {
		t.Error("a second change took the first one's time away")
	}
	third := restart()
	// Generation 2 runs, 3 does not: it is younger than 1.
	w := observe(2)
	if !w.PendingSince.After(third.UpdateTime) || !w.Pending() {
		t.Errorf("pending since %v", w.PendingSince)
	}
	if w := observe(3); !w.PendingSince.IsZero() || w.Pending() {
		t.Errorf("pending since %v", w.PendingSince)
	}
	if w := restart(); !w.PendingSince.Equal(w.UpdateTime) || !w.Pending() {
		t.Errorf("pending since %v", w.PendingSince)
	}
}

func TestFinishDeletion(t *testing.T) {
	h := newHarness(t)
	w := h.create("a", value("K", "1"), value("L", "2"))
	other := h.create("b", value("K", "3"))
	must(h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Delete: []string{"L"}}, Options{}))(t)
	if err := h.FinishDeletion(ctx, "a", w.UID); err == nil {
		t.Fatal("a workspace that nobody deleted was removed")
	}
	must(h.DeleteWorkspace(ctx, "a", false, Options{}))(t)
	if err := h.FinishDeletion(ctx, "a", other.UID); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Workspace("a"); err != nil {
		t.Fatalf("another uid removed it: %v", err)
	}
	h.record.take()
	for range 2 { // it can be repeated
		if err := h.FinishDeletion(ctx, "a", w.UID); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]Change{{ID: "a", UID: w.UID, Revision: h.Revision()}}, h.record.take()); diff != "" {
		t.Error(diff)
	}
	if _, err := h.Workspace("a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	for bucket, rows := range dump(t, h.db) {
		for key, row := range rows {
			if bucket != "feed" && (cmp.Equal(key, "a") || containsAny(key+row, w.UID)) {
				t.Errorf("%s still has %q", bucket, key)
			}
		}
	}
	if diff := cmp.Diff(map[string]string{"K": "3"}, h.values("b")); diff != "" {
		t.Error(diff)
	}

	// The id is free for another workspace, which has nothing of the old one.
	again := h.create("a")
	if again.UID == w.UID || again.Generation != 1 || len(h.values("a")) != 0 {
		t.Errorf("got %+v", again)
	}
	if err := h.FinishDeletion(ctx, "a", w.UID); err != nil {
		t.Fatal(err)
	}
	if got := must(h.Workspace("a"))(t); got.UID != again.UID {
		t.Errorf("got %+v", got)
	}
}

func TestListWorkspaces(t *testing.T) {
	h := newHarness(t)
	var all []Workspace
	for i := range listChunk + 10 {
		all = append(all, h.create(fmt.Sprintf("w%04d", i)))
	}
	even := func(w *Workspace) bool { return w.Revision%2 == 0 }
	var evens []Workspace
	for _, w := range all {
		if even(&w) {
			evens = append(evens, w)
		}
	}
	for _, test := range []struct {
		name  string
		after string
		limit int
		match func(*Workspace) bool
		want  []Workspace
		more  bool
	}{
		{"all", "", 0, nil, all, false},
		{"first two", "", 2, nil, all[:2], true},
		{"as many as there are", "", len(all), nil, all, false},
		{"one less", "", len(all) - 1, nil, all[:len(all)-1], true},
		{"after", "w0005", 2, nil, all[6:8], true},
		{"after one that is not there", "w0005x", 1, nil, all[6:7], true},
		{"after the last", all[len(all)-1].ID, 1, nil, nil, false},
		{"match", "", 0, even, evens, false},
		{"match, the last two", evens[len(evens)-3].ID, 2, even, evens[len(evens)-2:], false},
		{"match nothing", "", 1, func(*Workspace) bool { return false }, nil, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, more, err := h.ListWorkspaces(test.after, test.limit, test.match)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" || more != test.more {
				t.Errorf("more is %t, %s", more, diff)
			}
		})
	}
}

// A page reads what is on it and one more, wherever the list ends.
func TestListWorkspaces_ReadsAPage(t *testing.T) {
	h := newHarness(t)
	for i := range 5 {
		h.create(fmt.Sprint("w", i))
	}
	h.edit(func(tx *bolt.Tx) error { return tx.Bucket(bucketWorkspaces).Put([]byte("w3"), []byte("garbage")) })
	ws, more, err := h.ListWorkspaces("", 2, nil)
	if err != nil || len(ws) != 2 || !more {
		t.Errorf("%d workspaces, more is %t, %v", len(ws), more, err)
	}
	if _, _, err := h.ListWorkspaces("", 3, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("with the damaged one: %v", err)
	}
}
