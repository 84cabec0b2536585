package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

var updateFixture = flag.Bool("update-fixture", false, "write testdata for the newest schema version, once, before it is released")

// facts is what a database of an old version must still say.
type facts struct {
	Instance   string
	Revision   uint64
	Workspaces []Workspace
	Secrets    map[string][]Secret
	Versions   map[string][]SecretVersion `json:",omitempty"`
	Values     map[string]map[string]string
	Feed       []FeedEntry
	Replayed   Result
	Audit      []AuditEntry `json:",omitempty"`
	Tokens     []Token      `json:",omitempty"`
}

func readFacts(t *testing.T, s *Store) facts {
	t.Helper()
	ws, _, err := s.ListWorkspaces("", 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	f := facts{
		Instance: s.InstanceUID(), Revision: s.Revision(), Workspaces: ws,
		Secrets: map[string][]Secret{}, Versions: map[string][]SecretVersion{}, Values: map[string]map[string]string{},
	}
	scopes := []Scope{{}}
	for _, w := range ws {
		scopes = append(scopes, in(w.ID))
		f.Values[w.ID] = map[string]string{}
		for _, secret := range must(s.Snapshot(w.ID))(t).Secrets {
			f.Values[w.ID][secret.Key] = secret.Value.Reveal()
		}
	}
	for _, scope := range scopes {
		secrets, _, err := s.ListSecrets(scope, "", 0)
		if err != nil {
			t.Fatal(err)
		}
		f.Secrets[scope.WorkspaceID] = secrets
		for _, secret := range secrets {
			versions, _, err := s.ListSecretVersions(scope, secret.Key, 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			if len(versions) > 1 { // the only one the list of secrets tells of
				f.Versions[scope.WorkspaceID+"/"+secret.Key] = versions
			}
		}
	}
	f.Feed = must(s.Feed(1, 0))(t).Entries
	if f.Audit, _, _, err = s.AuditEntries(0, false, 100, nil); err != nil {
		t.Fatal(err)
	}
	if r := must(s.VerifyAudit(ctx))(t); r.Problems != 0 || r.Last != uint64(len(f.Audit)) {
		t.Errorf("the audit log is not whole: %+v", r)
	}
	f.Tokens = must(s.Tokens())(t)
	f.Replayed = must(s.RestartWorkspace(ctx, "full", request("id", "fingerprint")))(t)
	return f
}

// neverRolledOut leaves all changes of global secrets to the readers.
var neverRolledOut = rolloutPolicy{above: 0, chunk: 1, next: make(chan time.Time)}

// fixtureTime is before the requests in the fixtures end.
var fixtureTime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func fixture(version int, kind string) string {
	return filepath.Join("testdata", fmt.Sprintf("v%d.%s", version, kind))
}

func openFixture(t *testing.T, version int) *Store {
	t.Helper()
	dir := t.TempDir()
	for _, kind := range []string{"db", "key"} {
		b, err := os.ReadFile(fixture(version, kind))
		if err != nil {
			t.Fatalf("version %d has no fixture, see -update-fixture: %v", version, err)
		}
		if err := os.WriteFile(filepath.Join(dir, kind), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := must(Open(Config{
		Path: filepath.Join(dir, "db"), KEK: must(seal.Load(filepath.Join(dir, "key")))(t),
		Now: func() time.Time { return fixtureTime }, rollouts: neverRolledOut,
	}))(t)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// A database that each released version wrote opens, says what it said, and can
// be changed.
func TestMigrations_FromEachVersion(t *testing.T) {
	if *updateFixture {
		writeFixture(t)
	}
	if len(migrations) != schemaVersion-1 {
		t.Fatalf("%d migrations lead to version %d", len(migrations), schemaVersion)
	}
	for version := 1; version <= schemaVersion; version++ {
		t.Run(fmt.Sprint(version), func(t *testing.T) {
			s := openFixture(t, version)
			got := must(json.MarshalIndent(readFacts(t, s), "", "\t"))(t)
			want := must(os.ReadFile(fixture(version, "json")))(t)
			if diff := cmp.Diff(string(want), string(got)+"\n"); diff != "" {
				t.Error(diff)
			}
			must(s.UpdateSecrets(ctx, in("full"), set("K", "new", "DELETED", "again"), audited("set")))(t)
			secret := must(s.Secret(in("full"), "DELETED"))(t)
			if r := must(s.VerifyAudit(ctx))(t); r.Problems != 0 || r.Last == 0 {
				t.Errorf("the audit log is not whole after a change: %+v", r)
			}
			if secret.Version != 2 {
				t.Errorf("the deleted secret has version %d", secret.Version)
			}
			before := must(s.Secret(in("full"), "K"))(t)
			must(s.UpdateSecrets(ctx, in("full"), set("K", "newer"), Options{}))(t)
			must(s.UpdateSecrets(ctx, in("full"), SecretsUpdate{RollBack: &RollBack{"K", before.Version}}, Options{}))(t)
			for _, secret := range must(s.Snapshot("full"))(t).Secrets {
				if secret.Key == "K" && (secret.Value.Reveal() != "new" || secret.Version != before.Version+2) {
					t.Errorf("after the rollback it has version %d", secret.Version)
				}
			}
			if err := s.view(func(tx *bolt.Tx) error {
				v, err := schemaOf(tx)
				if v != schemaVersion {
					t.Errorf("schema version %d", v)
				}
				return err
			}); err != nil {
				t.Error(err)
			}
		})
	}
}

// writeFixture makes a database with some of everything.
func writeFixture(t *testing.T) {
	if _, err := os.Stat(fixture(schemaVersion, "db")); err == nil {
		t.Fatal("there is a fixture already: released versions never change")
	}
	h := newHarness(t)
	h.cfg.rollouts = neverRolledOut
	h.reopen()
	h.clock.now = fixtureTime.Add(-time.Minute)
	full := must(h.CreateWorkspace(ctx, NewWorkspace{
		ID: "full", Labels: map[string]string{"team": "a"}, Model: "m",
		Spec: Spec{
			Image: "registry/image:tag", Command: []string{"c", "d"}, Args: []string{"e"}, Env: map[string]string{"E": "1"},
			WorkingDir: "/w", User: "1:2", Resources: Resources{CPUMillis: 1, MemoryBytes: 2, Pids: 3},
			Volumes:      []Volume{{MountPath: "/a", HostPath: "/b", ReadOnly: true}, {MountPath: "/c", Name: "v"}},
			ReadOnlyRoot: true, ModelEnv: []string{"M"}, StopSignal: "SIGINT", StopGrace: ptr(time.Second),
			CrashPolicy: CrashPolicy{Restart: CrashRestartOnFailure, MaxRetries: 3}, SecretDelivery: DeliveryFiles,
			Security: SecurityBaseline, WorkspaceAPI: true,
		},
		Secrets: []SecretValue{value("K", "value"), value("DELETED", "x"), value("EMPTY", ""), value("G", "own")},
	}, Options{}))(t).Workspace
	must(h.UpdateSecrets(ctx, Scope{}, set("G", "global", "H", "global"), Options{}))(t)
	must(h.UpdateSecrets(ctx, in("full"), SecretsUpdate{Set: set("K", "value 2").Set, Delete: []string{"DELETED"}}, Options{}))(t)
	must(h.UpdateStatus(ctx, "full", full.UID, func(_ Workspace, st *Status) {
		now := h.clock.Now()
		*st = Status{
			ObservedGeneration: 2, StartingGeneration: 3, RestartCount: 1, Starts: 2,
			Running:  &Running{InstanceID: "i", PID: 7, ImageDigest: "sha256:0", StartTime: now, SecretVersions: map[string]int64{"K": 1}, TokenHash: "h"},
			Token:    &InstanceToken{InstanceID: "j", Hash: "h2"},
			LastGood: &LastGood{Generation: 2, Spec: Spec{Image: "i"}},
			LastExit: &Exit{Code: 137, Known: true, Signal: 9, OOMKilled: true, Time: now},
			Crashes:  Crashes{Generation: 2, InARow: 4}, EndedGeneration: 2,
			Failure: &Failure{Generation: 3, Reason: "R", Message: "m", Attempt: 2, Time: now, NextAttempt: now},
		}
	}))(t)
	must(h.UpdateSecrets(ctx, in("full"), SecretsUpdate{NextStart: true, Set: []SecretValue{
		{Key: "BINARY", Value: seal.New([]byte{0, 1}), Delivery: DeliverySpec}, {Key: "E", Value: seal.New([]byte("e")), Delivery: DeliveryEnv},
	}}, Options{}))(t)
	for _, v := range []string{"1", "2", "3"} {
		must(h.UpdateSecrets(ctx, in("full"), set("VERSIONS", v), Options{}))(t)
	}
	must(h.UpdateSecrets(ctx, in("full"), SecretsUpdate{RollBack: &RollBack{"VERSIONS", 1}}, Options{}))(t)
	must(h.SetVersionState(ctx, in("full"), "VERSIONS", 2, VersionDisabled, Options{}))(t)
	must(h.SetVersionState(ctx, in("full"), "VERSIONS", 3, VersionDestroyed, Options{}))(t)
	h.create("parked")
	must(h.StopWorkspace(ctx, "parked", Options{}))(t)
	h.create("deleting", value("K", "1"))
	must(h.DeleteWorkspace(ctx, "deleting", true, Options{}))(t)
	h.create("removed")
	h.remove("removed")
	must(h.UpdateSecrets(ctx, Scope{}, set("H", "global 2"), Options{}))(t)
	h.token(Token{
		ID: "id", Subject: "ci", Roles: []string{"viewer", "operator"}, Workspaces: "a-*", Labels: map[string]string{"team": "a"}, Creator: "unix:uid=0",
	})
	if err := h.UseTokens(ctx, map[string]time.Time{"id": h.clock.Now()}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.RevokeToken(ctx, "id", Options{}); err != nil {
		t.Fatal(err)
	}
	restart := request("id", "fingerprint")
	restart.Audit = &AuditEntry{
		Subject: "token:a", Peer: "10.0.0.1:2", Method: "m", Resource: "workspaces/full", Keys: []string{"K"}, Reason: "R", RequestID: "id", CallID: "c",
	}
	must(h.RestartWorkspace(ctx, "full", restart))(t)
	for range 2 {
		h.AuditLater(AuditEntry{Peer: "10.0.0.1:2", Method: "m", Code: "UNAUTHENTICATED", Reason: "R"})
	}
	key := must(os.ReadFile(filepath.Join(filepath.Dir(h.cfg.Path), "key")))(t)
	for kind, content := range map[string][]byte{"db": h.closeAndRead(), "key": key} {
		if err := os.WriteFile(fixture(schemaVersion, kind), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b := must(json.MarshalIndent(readFacts(t, openFixture(t, schemaVersion)), "", "\t"))(t)
	if err := os.WriteFile(fixture(schemaVersion, "json"), append(b, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMigrate_InOrder(t *testing.T) {
	h := filled(t)
	want := dump(t, h.db)
	h.close()
	var ran []int
	step := func(n int) migration {
		return func(tx *bolt.Tx, _ *seal.Sealer) error {
			ran = append(ran, n)
			return tx.Bucket(bucketMeta).Put([]byte("ran"), fmt.Append(tx.Bucket(bucketMeta).Get([]byte("ran")), n))
		}
	}
	steps := append(migrations[:len(migrations):len(migrations)], step(1), step(2), step(3))
	for range 2 { // the second time there is nothing to do
		s := must(open(h.cfg, steps))(t)
		got := dump(t, s.db)
		if s.Revision() != h.Revision() || s.InstanceUID() != h.InstanceUID() {
			t.Errorf("revision %d, instance %s", s.Revision(), s.InstanceUID())
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		want["meta"]["ran"], want["meta"]["schema"] = "123", string(number(schemaVersion+3))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	if diff := cmp.Diff([]int{1, 2, 3}, ran); diff != "" {
		t.Error(diff)
	}
	refused(t, h.cfg, ErrSchema) // the program before
}

func TestMigrate_AllOrNothing(t *testing.T) {
	h := filled(t)
	h.close()
	before := must(os.ReadFile(h.cfg.Path))(t)
	first := func(tx *bolt.Tx, _ *seal.Sealer) error { return tx.DeleteBucket(bucketWorkspaces) }
	errStep := errors.New("step fails")
	for name, second := range map[string]migration{
		"fails":  func(*bolt.Tx, *seal.Sealer) error { return errStep },
		"panics": func(*bolt.Tx, *seal.Sealer) error { panic(errStep) },
	} {
		steps := append(migrations[:len(migrations):len(migrations)], first, second)
		if _, err := open(h.cfg, steps); err == nil {
			t.Errorf("%s: it was opened", name)
		}
		if !bytes.Equal(before, must(os.ReadFile(h.cfg.Path))(t)) {
			t.Errorf("%s: the file was changed", name)
		}
	}
	h.open()
}

// A database of version 10 with damage that version itself would not have opened is
// refused, in a sentence that says what to do, and stays as it is.
func TestMigrate_DamagedOwners(t *testing.T) {
	global, full := "global", ""
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	if err := os.WriteFile(key, must(os.ReadFile(fixture(10, "key")))(t), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Path: filepath.Join(dir, "db"), KEK: must(seal.Load(key))(t), Now: func() time.Time { return fixtureTime }}
	good := must(os.ReadFile(fixture(10, "db")))(t)
	edit := func(t *testing.T, f func(tx *bolt.Tx) error) {
		t.Helper()
		if err := os.WriteFile(cfg.Path, good, 0o600); err != nil {
			t.Fatal(err)
		}
		db, file, err := openFile(cfg.Path, false)
		if err != nil {
			t.Fatal(err)
		}
		defer closeFile(db, file)
		if err := db.Update(f); err != nil {
			t.Fatal(err)
		}
	}
	var sealer *seal.Sealer
	edit(t, func(tx *bolt.Tx) error {
		w, err := getWorkspace(tx, "full")
		full = w.UID
		if err != nil {
			return err
		}
		kept, err := identify(tx, cfg, schemaVersion)
		if err != nil {
			return err
		}
		keys, err := openKeys(ctx, &cfg, kept)
		sealer = keys.sealer
		return err
	})
	flip := func(bucket []byte, at int) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			row := bytes.Clone(tx.Bucket(bucket).Get([]byte(full)))
			row[(at+len(row))%len(row)] ^= 1
			return tx.Bucket(bucket).Put([]byte(full), row)
		}
	}
	swap := func(tx *bolt.Tx, bucket []byte) error {
		b := tx.Bucket(bucket)
		one, other := bytes.Clone(b.Get([]byte(full))), bytes.Clone(b.Get([]byte(global)))
		return errors.Join(b.Put([]byte(full), other), b.Put([]byte(global), one))
	}
	// sealed seals other sums, as a migration from 9 seals what there is.
	sealed := func(tx *bolt.Tx, sums string) error {
		x := index(tx.Bucket(oldIndexes).Get([]byte(full))[sealBytes:])
		row, err := sealer.Seal(nil, oldAssociated([]byte(full), []byte(sums), x))
		row = append(row, x...)
		return errors.Join(err, tx.Bucket(oldOwners).Put([]byte(full), []byte(sums)), tx.Bucket(oldIndexes).Put([]byte(full), row))
	}
	for name, damage := range map[string]func(*bolt.Tx) error{
		"sums":       flip(oldOwners, -2),
		"no sums":    func(tx *bolt.Tx) error { return tx.Bucket(oldOwners).Put([]byte(full), []byte("{}")) },
		"seal":       flip(oldIndexes, 10),
		"index":      flip(oldIndexes, -1),
		"cut off":    func(tx *bolt.Tx) error { return tx.Bucket(oldIndexes).Put([]byte(full), make([]byte, sealBytes-1)) },
		"other size": func(tx *bolt.Tx) error { return tx.Bucket(oldIndexes).Put([]byte(full), make([]byte, sealBytes+1)) },
		"index without owner": func(tx *bolt.Tx) error {
			return tx.Bucket(oldIndexes).Put([]byte("nobody"), bytes.Clone(tx.Bucket(oldIndexes).Get([]byte(full))))
		},
		"owner without index": func(tx *bolt.Tx) error { return tx.Bucket(oldIndexes).Delete([]byte(full)) },
		"swapped sums":        func(tx *bolt.Tx) error { return swap(tx, oldOwners) },
		"swapped indexes":     func(tx *bolt.Tx) error { return swap(tx, oldIndexes) },
		"swapped owners":      func(tx *bolt.Tx) error { return errors.Join(swap(tx, oldOwners), swap(tx, oldIndexes)) },
		"no owner, no index": func(tx *bolt.Tx) error {
			return errors.Join(tx.Bucket(oldOwners).Delete([]byte(full)), tx.Bucket(oldIndexes).Delete([]byte(full)))
		},
		"negative sums":    func(tx *bolt.Tx) error { return sealed(tx, `{"bytes":-1,"keyBytes":21,"retired":1}`) },
		"sums are no JSON": func(tx *bolt.Tx) error { return sealed(tx, "garbage") },
		"no owners":        func(tx *bolt.Tx) error { return tx.DeleteBucket(oldOwners) },
		"no indexes":       func(tx *bolt.Tx) error { return tx.DeleteBucket(oldIndexes) },
		"no secrets":       func(tx *bolt.Tx) error { return tx.DeleteBucket(bucketSecrets) },
		"a counter":        func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Put(counterRevision, []byte("x")) },
	} {
		t.Run(name, func(t *testing.T) {
			edit(t, damage)
			refused(t, cfg, ErrDamaged)
			_, err := Open(cfg)
			if !strings.Contains(err.Error(), "is damaged (") || !strings.HasSuffix(err.Error(), "): restore it from a backup") || strings.Contains(err.Error(), "runtime error") {
				t.Errorf("got %v", err)
			}
		})
	}
	edit(t, func(tx *bolt.Tx) error { // and with none it opens
		return sealed(tx, string(tx.Bucket(oldOwners).Get([]byte(full))))
	})
	s := must(Open(cfg))(t)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// What is none of the file's damage is not called that.
func TestMigrate_OtherErrors(t *testing.T) {
	h := filled(t)
	h.close()
	steps := append(migrations[:len(migrations):len(migrations)], func(*bolt.Tx, *seal.Sealer) error { return syscall.EIO })
	if _, err := open(h.cfg, steps); err == nil || errors.Is(err, ErrDamaged) || !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v", err)
	}
}
