package store

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/workspaced/workspaced/store/seal"
)

// The workload of the crash tests: some writers set a secret of one workspace
// each, again and again, to numbers that count up, and one writer makes and
// removes workspaces, and sets a global secret.
const crashWriters = 4

// commitLoop does the workload until a change fails, or forever, and calls
// acknowledged with each change that was acknowledged: what was set to which
// number, or, with 0, the id of a workspace that was removed.
func commitLoop(s *Store, acknowledged func(what string, n int)) error {
	for i := range crashWriters {
		if _, err := s.CreateWorkspace(ctx, NewWorkspace{ID: fmt.Sprint("w", i)}, Options{}); err != nil && !errors.Is(err, ErrExists) {
			return err
		}
	}
	begin, err := numbers(s)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make(chan error, crashWriters+1)
	for i := range crashWriters {
		wg.Go(func() {
			id := fmt.Sprint("w", i)
			for n := begin[id] + 1; ; n++ {
				// Of changing size, so that pages split and merge.
				text := fmt.Sprintf("%d %s", n, strings.Repeat("x", n*997%3000))
				if _, err := s.UpdateSecrets(ctx, in(id), set("K", text), Options{Audit: &AuditEntry{Method: "set", Resource: id}}); err != nil {
					errs <- err
					return
				}
				acknowledged(id, n)
			}
		})
	}
	wg.Go(func() {
		for n := begin["global"] + 1; ; n++ {
			id := "short-" + uuid.NewString()
			r, err := s.CreateWorkspace(ctx, NewWorkspace{ID: id, Secrets: []SecretValue{value("K", "1")}}, Options{})
			if err == nil {
				_, err = s.UpdateSecrets(ctx, Scope{}, set("G", fmt.Sprint(n)), Options{})
			}
			if err == nil {
				acknowledged("global", n)
				_, err = s.DeleteWorkspace(ctx, id, false, Options{})
			}
			if err == nil {
				err = s.FinishDeletion(ctx, id, r.Workspace.UID)
			}
			if err != nil {
				errs <- err
				return
			}
			acknowledged(id, 0)
		}
	})
	wg.Wait()
	return <-errs
}

// numbers returns up to where the workload has come.
func numbers(s *Store) (map[string]int, error) {
	ws, _, err := s.ListWorkspaces("w", 0, nil)
	found := map[string]int{}
	for i := 0; i < len(ws) && err == nil; i++ {
		var snapshot Snapshot
		snapshot, err = s.Snapshot(ws[i].ID)
		for _, secret := range snapshot.Secrets {
			what := map[string]string{"K": ws[i].ID, "G": "global"}[secret.Key]
			var n int
			if _, scan := fmt.Sscan(secret.Value.Reveal(), &n); scan != nil {
				err = scan
			}
			found[what] = n
		}
	}
	return found, err
}

// checkAcknowledged checks that each change that was acknowledged is there; the
// one after it, which was not, may be. What is there counts as acknowledged from
// now on.
func checkAcknowledged(t *testing.T, s *Store, acknowledged map[string]int) {
	t.Helper()
	found, err := numbers(s)
	if err != nil {
		t.Fatal(err)
	}
	for what, want := range acknowledged {
		if want > 0 && found[what] != want && found[what] != want+1 {
			t.Errorf("%s is %d, acknowledged was %d", what, found[what], want)
		}
		if want > 0 {
			acknowledged[what] = found[what]
			continue
		}
		if _, err := s.Workspace(what); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s was removed, and is there: %v", what, err)
		}
	}
}

// checkAudit checks that the audit log is whole and has each change that was made,
// and no other.
func checkAudit(t *testing.T, s *Store) {
	t.Helper()
	if r := must(s.VerifyAudit(ctx))(t); r.Problems != 0 {
		t.Errorf("the audit log has %d problems: %s", r.Problems, r.Problem)
	}
	entries := map[string]int64{}
	for last, more := uint64(0), true; more; {
		var page []AuditEntry
		var err error
		if page, last, more, err = s.AuditEntries(last, false, 1000, nil); err != nil {
			t.Fatal(err)
		}
		for _, e := range page {
			entries[e.Resource]++
		}
	}
	for i := range crashWriters {
		id := fmt.Sprint("w", i)
		secret, err := s.Secret(in(id), "K")
		if err != nil && !errors.Is(err, ErrNotFound) {
			t.Fatal(err)
		}
		if secret.Version != entries[id] {
			t.Errorf("%s was set %d times, and the audit log has %d", id, secret.Version, entries[id])
		}
	}
}

const crashChild = "WORKSPACED_TEST_CRASH"

// Killed at any moment, a process has lost nothing that it acknowledged, and its
// file passes every check.
func TestContract08_Killed(t *testing.T) {
	if dir := os.Getenv(crashChild); dir != "" {
		inCrashChild(t, dir)
		return
	}
	dir := t.TempDir()
	cfg := Config{Path: filepath.Join(dir, "workspaced.db"), KEK: must(seal.LoadOrCreate(filepath.Join(dir, "key")))(t)}
	acknowledged := map[string]int{}
	total := 0
	for round := range 30 {
		changes := killWriter(t, dir, cfg, round, acknowledged)
		total += changes
		s := must(Open(cfg))(t) // which checks every page and every row
		checkAcknowledged(t, s, acknowledged)
		checkAudit(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d changes were acknowledged", total)
	for i := range crashWriters {
		if acknowledged[fmt.Sprint("w", i)] < 30 {
			t.Errorf("only %d changes of w%d were acknowledged", acknowledged[fmt.Sprint("w", i)], i)
		}
	}
}

// killWriter lets a child write and kills it after a while. It returns how many
// changes were acknowledged, and the last ones in acknowledged.
func killWriter(t *testing.T, dir string, cfg Config, round int, acknowledged map[string]int) (changes int) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestContract08_Killed$")
	cmd.Env = append(os.Environ(), crashChild+"="+dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	// From the first change on: nothing, some, or many.
	timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var what string
		var n int
		if _, err := fmt.Sscanf(lines.Text(), "acknowledged %s %d", &what, &n); err != nil {
			continue // of the test's own
		}
		if changes == 0 {
			if round == 0 { // the file is this process's alone
				refusedLocked(t, cfg)
			}
			timer.Reset(time.Duration(rand.Int64N(int64(100 * time.Millisecond))))
		}
		changes++
		if n > 0 && n <= acknowledged[what] {
			t.Errorf("%s %d was acknowledged after %d", what, n, acknowledged[what])
		}
		acknowledged[what] = n
	}
	_ = cmd.Wait()
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL || changes == 0 {
		t.Fatalf("the child ended by itself: %v, after %d changes", cmd.ProcessState, changes)
	}
	return changes
}

func refusedLocked(t *testing.T, cfg Config) {
	t.Helper()
	if _, err := Open(cfg); !errors.Is(err, ErrLocked) || !strings.HasSuffix(err.Error(), "is in use by another process") {
		t.Errorf("a second process: got %v", err)
	}
}

func inCrashChild(t *testing.T, dir string) {
	s := must(Open(Config{Path: filepath.Join(dir, "workspaced.db"), KEK: must(seal.Load(filepath.Join(dir, "key")))(t)}))(t)
	var mu sync.Mutex
	t.Fatal(commitLoop(s, func(what string, n int) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Printf("acknowledged %s %d\n", what, n)
	}))
}

// The power fails at any moment: what was not synced is gone, what was
// acknowledged is there.
func TestContract01_PowerFailure(t *testing.T) {
	withOwnMounts(t, func(t *testing.T, dir string) {
		fs := newExt4(t, dir, "64M")
		kek := must(seal.LoadOrCreate(filepath.Join(dir, "key")))(t)
		cfg := Config{Path: filepath.Join(fs.dir, "workspaced.db"), KEK: kek}
		acknowledged := map[string]int{}
		total := 0
		for range 15 {
			s := must(Open(cfg))(t)
			var mu sync.Mutex
			first := make(chan struct{})
			var once sync.Once
			ended := make(chan error, 1)
			go func() {
				ended <- commitLoop(s, func(what string, n int) {
					mu.Lock()
					defer mu.Unlock()
					acknowledged[what] = n
					total++
					once.Do(func() { close(first) })
				})
			}()
			<-first
			<-time.After(time.Duration(rand.Int64N(int64(50 * time.Millisecond))))
			fs.cutPower()
			if err := <-ended; err == nil {
				t.Fatal("the writers have ended without an error")
			}
			_ = s.Close()
			fs.unmount()
			fs.mount()
			s = must(Open(cfg))(t)
			checkAcknowledged(t, s, acknowledged)
			checkAudit(t, s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		t.Logf("%d changes were acknowledged", total)
	})
}
