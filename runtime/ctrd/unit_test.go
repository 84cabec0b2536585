package ctrd

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// unit returns a driver without a containerd, for tests of its parts.
func unit() *Driver {
	return &Driver{around: plain, deadlines: defaultDeadlines, log: slog.New(slog.DiscardHandler)}
}

func TestCommand(t *testing.T) {
	image := ocispec.ImageConfig{Entrypoint: []string{"/entry"}, Cmd: []string{"image-arg"}}
	tests := map[string]struct {
		command, args []string
		image         ocispec.ImageConfig
		want          []string
		missing       bool
	}{
		"the image's":                     {nil, nil, image, []string{"/entry", "image-arg"}, false},
		"args replace the image's":        {nil, []string{"a"}, image, []string{"/entry", "a"}, false},
		"command replaces both":           {[]string{"/c"}, nil, image, []string{"/c"}, false},
		"command and args":                {[]string{"/c", "x"}, []string{"a"}, image, []string{"/c", "x", "a"}, false},
		"only the image's cmd":            {nil, nil, ocispec.ImageConfig{Cmd: []string{"/cmd"}}, []string{"/cmd"}, false},
		"args as the command of an image": {nil, []string{"/a"}, ocispec.ImageConfig{}, []string{"/a"}, false},
		"none":                            {nil, nil, ocispec.ImageConfig{}, nil, true},
		"an empty word":                   {[]string{""}, nil, image, nil, true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := command(runtime.Spec{Command: test.command, Args: test.args}, test.image)
			var e *runtime.Error
			if missing := errors.As(err, &e) && e.Reason == runtime.ReasonCommandMissing; missing != test.missing || !cmp.Equal(got, test.want) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func TestMergeEnv(t *testing.T) {
	got := mergeEnv([]string{"A=image", "B=image", "PATH=/image"}, []string{"B=1", "C=1", "B=2"})
	if d := cmp.Diff([]string{"A=image", "B=2", "PATH=/image", "C=1"}, got); d != "" {
		t.Error(d)
	}
	if got := lookupEnv(mergeEnv(nil, []string{"XPATH=no"}), "PATH"); got != defaultPath {
		t.Errorf("PATH without one = %q", got)
	}
}

func TestCheckEnv(t *testing.T) {
	tests := map[string]struct {
		env  []string
		want runtime.Reason
	}{
		"fits":            {[]string{"A=" + strings.Repeat("x", maxString-3)}, ""},
		"one byte more":   {[]string{"A=" + strings.Repeat("x", maxString-2)}, runtime.ReasonEnvironmentTooLarge},
		"all too large":   {strings.Fields(strings.Repeat("A="+strings.Repeat("x", 100_000)+" ", 22)), runtime.ReasonEnvironmentTooLarge},
		"NUL":             {[]string{"A=canary\x00canary"}, runtime.ReasonExecFailed},
		"no key":          {[]string{"=canary"}, runtime.ReasonExecFailed},
		"no equals sign":  {[]string{"canary"}, runtime.ReasonExecFailed},
		"an empty value":  {[]string{"A="}, ""},
		"an equals value": {[]string{"A==="}, ""},
		"a PATH of much":  {[]string{"PATH=" + strings.Repeat(":", 40_000)}, ""},
		"of too much":     {[]string{"PATH=" + strings.Repeat(":", 100_000)}, runtime.ReasonEnvironmentTooLarge},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := checkEnv(test.env, []string{"command"})
			var e *runtime.Error
			switch {
			case test.want == "" && err == nil:
			case !errors.As(err, &e) || e.Reason != test.want || !e.Permanent:
				t.Errorf("error = %v, want a permanent %s", err, test.want)
			case strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), "xxx"):
				t.Errorf("the error shows a value: %v", err)
			}
		})
	}
}

func TestCheckLaunch(t *testing.T) {
	image := []string{"PATH=/image", "LANG=C"}
	argv := []string{"/command", "argument"}
	rest := len("PATH=/image") + len("LANG=C") + len("/command") + len("argument") + 4*9
	tests := map[string]struct {
		env    []string
		launch int
		fits   bool
	}{
		"nothing known":          {nil, 0, true},
		"all that fits":          {nil, maxTotal - rest, true},
		"a byte more":            {nil, maxTotal - rest + 1, false},
		"one laid over":          {[]string{"LANG=de"}, maxTotal - rest + len("LANG=C") + 9, true},
		"one laid over and more": {[]string{"LANG=de"}, maxTotal - rest + len("LANG=C") + 9 + 1, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := checkLaunch(runtime.Spec{Env: test.env, LaunchBytes: test.launch}, image, argv)
			var e *runtime.Error
			if refused := errors.As(err, &e) && e.Reason == runtime.ReasonEnvironmentTooLarge && e.Permanent; refused == test.fits {
				t.Errorf("error = %v, want it to fit: %t", err, test.fits)
			}
		})
	}
}

func TestNewID(t *testing.T) {
	for _, workspace := range []string{"a", "a-b", "a--b---c", strings.Repeat("x", 63)} {
		id := runtime.NewInstanceID(workspace)
		if err := identifiers.Validate(id); err != nil || !instanceID.MatchString(id) {
			t.Errorf("id of %q: %q, %v", workspace, id, err)
		}
		if id == runtime.NewInstanceID(workspace) {
			t.Errorf("two ids of %q are the same", workspace)
		}
	}
	for _, bad := range []string{"", "..", "a/../b-0123456789ab", "A-0123456789ab", ".init-0123456789ab", "a-0123456789a"} {
		if instanceID.MatchString(bad) {
			t.Errorf("%q is taken for an instance's id", bad)
		}
	}
}

func TestImageCause(t *testing.T) {
	tests := map[string]struct {
		err    error
		reason runtime.Reason
		text   string
	}{
		"not found":       {remoteerrors.ErrUnexpectedStatus{StatusCode: 404}, runtime.ReasonImageNotFound, "HTTP 404 Not Found"},
		"server error":    {remoteerrors.ErrUnexpectedStatus{StatusCode: 503}, runtime.ReasonImagePullFailed, "HTTP 503 Service Unavailable"},
		"login":           {errors.New("pull access denied: insufficient_scope: authorization failed"), runtime.ReasonImagePullFailed, "refuses access"},
		"refused":         {&net.OpError{Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, runtime.ReasonImagePullFailed, "connection refused"},
		"authority":       {x509.UnknownAuthorityError{}, runtime.ReasonImagePullFailed, "not trusted"},
		"another host":    {x509.HostnameError{Certificate: &x509.Certificate{}, Host: "h"}, runtime.ReasonImagePullFailed, "for another host"},
		"name":            {&net.DNSError{Name: "registry.test", IsNotFound: true}, runtime.ReasonImagePullFailed, `"registry.test" can't be resolved`},
		"platform":        {fmt.Errorf("no match for platform in manifest: %w", errdefs.ErrNotFound), runtime.ReasonImageInvalid, "no manifest for this machine"},
		"a layer is gone": {fmt.Errorf("blob: %w", errdefs.ErrNotFound), runtime.ReasonImagePullFailed, "a part of it is missing"},
		"damaged":         {errors.New("unexpected commit digest sha256:1, expected sha256:2"), runtime.ReasonImageInvalid, "damaged"},
		"disk full":       {errors.New("write /x: no space left on device"), runtime.ReasonImagePullFailed, "no space left"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := imageFailure(t.Context(), "r.test/image:1", fmt.Errorf("wrapped: %w", test.err))
			var e *runtime.Error
			if !errors.As(err, &e) || e.Reason != test.reason || !strings.Contains(e.Message, test.text) || !strings.Contains(e.Message, "r.test/image:1") {
				t.Errorf("got %v, want %s with %q", err, test.reason, test.text)
			}
		})
	}
}

func TestFailure(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	defer cancel()
	inner := errors.New("inner")
	tests := map[string]struct {
		ctx    context.Context
		err    error
		reason runtime.Reason // "": no *runtime.Error
		is     error
	}{
		"cancelled":         {ended, inner, "", context.Canceled},
		"deadline":          {late, inner, runtime.ReasonTimeout, context.DeadlineExceeded},
		"a step's deadline": {t.Context(), status.Error(codes.DeadlineExceeded, "late"), runtime.ReasonTimeout, context.DeadlineExceeded},
		"no containerd":     {t.Context(), status.Error(codes.Unavailable, "down"), runtime.ReasonRuntimeUnavailable, nil},
		"not found":         {ended, runtime.ErrNotFound, "", runtime.ErrNotFound},
		"known":             {t.Context(), &runtime.Error{Reason: runtime.ReasonVolume}, runtime.ReasonVolume, nil},
		"anything else":     {t.Context(), inner, runtime.ReasonRuntimeError, inner},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := failure(test.ctx, "step", test.err)
			var e *runtime.Error
			if has := errors.As(err, &e); has != (test.reason != "") || has && e.Reason != test.reason {
				t.Errorf("got %v, want reason %q", err, test.reason)
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("%v is no %v", err, test.is)
			}
		})
	}
	// Which step it was is told, the innermost.
	steps := &stepError{stepContainerCreate, fmt.Errorf("client: %w", &stepError{stepSnapshotPrepare, inner})}
	for _, test := range []struct {
		ctx  context.Context
		err  error
		want string
	}{
		{late, steps, "TIMEOUT: the call took longer than its deadline at snapshot.prepare"},
		{t.Context(), &stepError{stepTaskGet, status.Error(codes.Unavailable, "down")}, "RUNTIME_UNAVAILABLE: the call at task.get: containerd does not answer"},
		{t.Context(), &stepError{stepLogMake, &os.PathError{Op: "open", Path: "/d/w.log", Err: unix.EROFS}}, "STORAGE_UNAVAILABLE: the call at log.make: /d/w.log: read-only file system"},
		{t.Context(), &stepError{stepFIFOMake, unix.EDQUOT}, "STORAGE_UNAVAILABLE: the call at fifo.make: disk quota exceeded"},
		{t.Context(), &stepError{stepSnapshotPrepare, status.Error(codes.Unknown, "mkdir /x: no space left on device")},
			"STORAGE_UNAVAILABLE: the call at snapshot.prepare: snapshot.prepare: rpc error: code = Unknown desc = mkdir /x: no space left on device"},
		{t.Context(), &stepError{stepTaskCreate, errors.New("runc: mkdir /data: read-only file system")}, "RUNTIME_ERROR: the call: task.create: runc: mkdir /data: read-only file system"},
		{t.Context(), steps, "RUNTIME_ERROR: the call: container.create: client: snapshot.prepare: inner"},
	} {
		if got := failure(test.ctx, "the call", test.err); got.Error() != test.want || !errors.Is(got, test.err) {
			t.Errorf("got %v, want %s", got, test.want)
		}
	}
	if failure(ended, "step", nil) != nil {
		t.Error("no error became one")
	}
}

// What init reports is what a caller of the API may read, in letters.
func TestRefusal(t *testing.T) {
	for _, test := range []struct {
		res    handshake.Result
		reason runtime.Reason
	}{
		{handshake.Result{Cause: handshake.CauseNotFound, Errno: uint32(syscall.ENOENT), Message: "cut ä"[:5]}, runtime.ReasonCommandNotFound},
		{handshake.Result{Cause: handshake.CauseExec, Errno: uint32(syscall.E2BIG), Message: "x"}, runtime.ReasonEnvironmentTooLarge},
		{handshake.Result{Cause: handshake.CauseExec, Errno: uint32(syscall.ENOMEM), Message: "x"}, runtime.ReasonExecFailed},
		{handshake.Result{Cause: handshake.CauseNone, Message: "x"}, runtime.ReasonExecFailed},
		{handshake.Result{Cause: handshake.CauseExec, Errno: uint32(syscall.ENOEXEC)}, runtime.ReasonExecFailed},
	} {
		if e := refusal(test.res); e.Reason != test.reason || !utf8.ValidString(e.Message) || e.Message == "" {
			t.Errorf("%+v is %v", test.res, e)
		}
	}
}

func TestFlights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fs flights
		parent, stop := context.WithCancel(t.Context())
		runs, release := 0, make(chan struct{})
		work := func(ctx context.Context) (string, error) {
			runs++
			select {
			case <-release:
				return "done", nil
			case <-ctx.Done():
				return "", ctx.Err()
			}
		}
		type answer struct {
			value string
			err   error
		}
		var wg sync.WaitGroup
		call := func(ctx context.Context, a *answer) {
			wg.Go(func() { a.value, a.err = fs.do(ctx, parent, "key", work) })
			synctest.Wait()
		}

		var leaves, stays answer
		ctx, leave := context.WithCancel(t.Context())
		call(ctx, &leaves)
		call(t.Context(), &stays)
		leave()
		synctest.Wait()
		close(release)
		wg.Wait()
		if !errors.Is(leaves.err, context.Canceled) || stays.value != "done" || stays.err != nil || runs != 1 {
			t.Errorf("who left got %v, who stayed %v; %d runs", leaves, stays, runs)
		}

		// When the last one leaves, the work ends; the next one begins anew.
		release = make(chan struct{})
		var last, next answer
		ctx, leave = context.WithCancel(t.Context())
		call(ctx, &last)
		leave()
		wg.Wait()
		call(t.Context(), &next)
		close(release)
		wg.Wait()
		if !errors.Is(last.err, context.Canceled) || next.value != "done" || runs != 3 {
			t.Errorf("the last got %v, the next %v; %d runs", last, next, runs)
		}

		// Closing ends what runs.
		release = make(chan struct{})
		var open, closed answer
		call(t.Context(), &open)
		stop()
		fs.wait()
		wg.Wait()
		call(t.Context(), &closed)
		if open.err == nil || closed.err == nil {
			t.Errorf("after closing: %v, %v", open, closed)
		}
	})
}

func startProcess(t *testing.T, name string, args ...string) (*exec.Cmd, uint64) {
	t.Helper()
	cmd := exec.Command(name, args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	start, err := startTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return cmd, start
}

func TestProcess(t *testing.T) {
	cmd, start := startProcess(t, "sleep", "1000")
	pid := cmd.Process.Pid
	if p, err := openProcess(pid, start+1); p != nil || err != nil {
		t.Errorf("a process with another start time: %v, %v", p, err)
	}
	p, err := openProcess(pid, start)
	if err != nil || p == nil {
		t.Fatal(p, err)
	}
	defer p.close()
	if p.ended() {
		t.Error("a living process has ended")
	}
	for range 2 { // a wait that was cancelled leaves the process as it was
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if err := p.wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("wait = %v", err)
		}
		cancel()
	}
	if err := p.signal(unix.SIGUSR1); err != nil {
		t.Error(err)
	}
	if err := p.wait(t.Context()); err != nil || !p.ended() {
		t.Errorf("wait = %v, ended = %t", err, p.ended())
	}
	if _, known := p.exitStatus(); known {
		t.Error("the exit status is known before the parent has asked")
	}
	if err := cmd.Wait(); err == nil {
		t.Error("no exit error")
	}
	if status, known := p.exitStatus(); known && status.Signal() != unix.SIGUSR1 {
		t.Errorf("exit status %v", status)
	} else if !known {
		t.Log("NOT TESTED: this kernel does not tell the exit status of a pidfd")
	}
	if err := p.signal(unix.SIGKILL); err != nil {
		t.Errorf("a signal to a process that is gone: %v", err)
	}
	if p, err := openProcess(pid, start); p != nil || err != nil {
		t.Errorf("a process that is gone: %v, %v", p, err)
	}
}

func TestStopProcess(t *testing.T) {
	for name, grace := range map[string]time.Duration{"signal": time.Minute, "no grace": 0} {
		t.Run(name, func(t *testing.T) {
			cmd, start := startProcess(t, "sleep", "1000")
			p, err := openProcess(cmd.Process.Pid, start)
			if err != nil || p == nil {
				t.Fatal(p, err)
			}
			defer p.close()
			if err := unit().stopProcess(t.Context(), p, syscall.SIGUSR2, grace); err != nil {
				t.Error(err)
			}
			_ = cmd.Wait()
			want := syscall.SIGUSR2
			if grace == 0 {
				want = syscall.SIGKILL
			}
			if got := cmd.ProcessState.Sys().(syscall.WaitStatus).Signal(); got != want {
				t.Errorf("ended by %v, want %v", got, want)
			}
		})
	}
}

func TestRecordIsReplacedAtOnce(t *testing.T) {
	d := &Driver{instances: t.TempDir()}
	want := &record{ID: "a-0123456789ab", WorkspaceID: "a", WorkspaceUID: "uid-a", PID: 5, PIDStart: 6, Init: fileID{1, 2},
		Launch: &launchRecord{Generation: 7, SecretVersions: map[string]int64{"KEY": 1}, StartTime: time.Now().UTC()},
		Exit:   &runtime.Exit{Code: 3, Known: true, Time: time.Now().UTC()}}
	if rec, err := d.readRecord(want.WorkspaceUID, want.ID); rec != nil || err != nil {
		t.Errorf("no record: %v, %v", rec, err)
	}
	if err := d.makeInstanceDir(want.WorkspaceUID, want.ID); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.writeRecord(want); err != nil {
			t.Fatal(err)
		}
		got, err := d.readRecord(want.WorkspaceUID, want.ID)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	if entries, _ := os.ReadDir(d.instanceDir(want.WorkspaceUID, want.ID)); len(entries) != 2 { // it and the FIFOs' directory
		t.Errorf("%d files", len(entries))
	}
	if err := os.WriteFile(filepath.Join(d.instanceDir(want.WorkspaceUID, want.ID), recordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if rec, err := d.readRecord(want.WorkspaceUID, want.ID); err == nil {
		t.Errorf("a damaged record was read as %v", rec)
	}
}

// What Arm writes is put into the record's place at once, unless that has changed.
func TestRecordThatIsMadeAhead(t *testing.T) {
	launch := runtime.Launch{Generation: 7, SecretVersions: map[string]int64{"KEY": 1}, GlobalSecrets: []string{"KEY"}}
	for name, change := range map[string]func(*record){
		"as it was":     nil,
		"has changed":   func(r *record) { r.Stopping = true },
		"was rewritten": func(*record) {},
	} {
		t.Run(name, func(t *testing.T) {
			d := &Driver{instances: t.TempDir(), around: plain}
			rec := &record{ID: "a-0123456789ab", WorkspaceID: "a", WorkspaceUID: "uid-a", PID: 5, PIDStart: 6}
			s := &standby{record: rec, armed: &armed{launch: launch}, names: []string{"KEY"}}
			d.standbys = map[string]*standby{rec.ID: s}
			if err := errors.Join(d.makeInstanceDir(rec.WorkspaceUID, rec.ID), d.writeRecord(rec), d.recordAhead(s)); err != nil {
				t.Fatal(err)
			}
			if got, err := d.readRecord(rec.WorkspaceUID, rec.ID); err != nil || got.Launch != nil {
				t.Fatalf("armed, it is on record as started: %+v, %v", got, err)
			}
			if change != nil {
				if _, err := d.updateRecord(t.Context(), stepRecordStopping, rec, change); err != nil {
					t.Fatal(err)
				}
			}
			armed, err := os.Stat(filepath.Join(d.instanceDir(rec.WorkspaceUID, rec.ID), armedFile))
			if err != nil {
				t.Fatal(err)
			}
			if err := d.recordLaunch(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			placed, err := os.Stat(filepath.Join(d.instanceDir(rec.WorkspaceUID, rec.ID), recordFile))
			if err != nil || os.SameFile(armed, placed) != (change == nil) {
				t.Errorf("the armed record is in place: %t, %v", os.SameFile(armed, placed), err)
			}
			got, err := d.readRecord(rec.WorkspaceUID, rec.ID)
			if err != nil {
				t.Fatal(err)
			}
			want := *rec
			want.Stopping = name == "has changed"
			if diff := cmp.Diff(&want, got); diff != "" {
				t.Error(diff)
			}
			if d := time.Since(got.Launch.StartTime); d < 0 || d > time.Minute {
				t.Errorf("started at %v", got.Launch.StartTime)
			}
			// Later changes keep the time, which was not in the file at first.
			if _, err := d.updateRecord(t.Context(), stepRecordStopping, rec, func(r *record) { r.Removing = true }); err != nil {
				t.Fatal(err)
			}
			if after, err := d.readRecord(rec.WorkspaceUID, rec.ID); err != nil || !after.Launch.StartTime.Equal(got.Launch.StartTime) {
				t.Errorf("changed, it says it was started at %v, not %v; %v", after.Launch.StartTime, got.Launch.StartTime, err)
			}
		})
	}
}

// Where putting files into place has failed half way nobody knows what is there: the
// next launch has its own files all the same.
func TestFilesOfAStandby(t *testing.T) {
	fail := ""
	d := &Driver{instances: t.TempDir(), around: func(ctx context.Context, step string, do func(context.Context) error) error {
		if err := do(ctx); err != nil || step != fail {
			return err
		}
		return errors.New("failed after " + step)
	}}
	rec := &record{ID: "a-0123456789ab", WorkspaceID: "a", WorkspaceUID: "uid-a", PID: 5, PIDStart: 6}
	s := &standby{record: rec, argv: []string{"x"}, placed: true}
	dir := d.filesDir(rec.WorkspaceUID, rec.ID)
	if err := errors.Join(d.makeInstanceDir(rec.WorkspaceUID, rec.ID), os.Mkdir(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	file := func(content string) []runtime.File { return []runtime.File{{Name: "K", Data: []byte(content)}} }
	for i, launch := range []struct {
		files []runtime.File
		fail  string
	}{
		{file("1"), stepFilesSwitch}, {nil, ""}, {file("1"), ""}, {file("2"), stepFilesSwitch}, {file("1"), ""},
		{file("2"), stepFilesWrite}, {file("1"), ""}, {file("2"), stepFilesLink}, {nil, ""}, {nil, ""},
	} {
		fail = launch.fail
		err := d.arm(t.Context(), s, runtime.Launch{Generation: int64(i), Files: launch.files})
		if (err != nil) != (fail != "") {
			t.Fatalf("launch %d: %v", i, err)
		}
		if err != nil {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, "K"))
		if launch.files == nil && (!errors.Is(err, os.ErrNotExist) || len(s.names) > 0) {
			t.Errorf("launch %d, which has no files: %q, %v, %v", i, content, err, s.names)
		}
		if launch.files != nil && (string(content) != string(launch.files[0].Data) || len(s.names) != 1) {
			t.Errorf("launch %d: %q, %v, %v, want %q", i, content, err, s.names, launch.files[0].Data)
		}
	}
}

func TestVolumesStayWhereTheyBelong(t *testing.T) {
	d := &Driver{volumes: t.TempDir()}
	outside := t.TempDir()
	if err := os.MkdirAll(filepath.Join(d.volumes, "w"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(d.volumes, "w", "link")); err != nil {
		t.Fatal(err)
	}
	for _, m := range []runtime.Mount{
		{Path: "/data", Volume: ".."},
		{Path: "/data", Volume: "a/b"},
		{Path: "/data", Volume: "../w2"},
		{Path: "/data", Volume: "link"},
		{Path: "/", Volume: "v"},
		{Path: "data", Volume: "v"},
		{Path: "/run/workspaced", Volume: "v"},
		{Path: "/run/workspaced/x/..", Volume: "v"},
		{Path: "/run/workspaced-init", Volume: "v"},
		{Path: "/data"},
		{Path: "/data", Volume: "v", HostPath: outside},
		{Path: "/data", HostPath: "relative"},
		{Path: "/data", HostPath: filepath.Join(outside, "missing")},
	} {
		d.cfg.Policy.HostPaths = []string{outside}
		_, err := d.mounts(runtime.Spec{WorkspaceID: "w", Mounts: []runtime.Mount{m}})
		var e *runtime.Error
		if !errors.As(err, &e) || e.Reason != runtime.ReasonVolume || e.Message == "" {
			t.Errorf("%+v: %v, want %s", m, err, runtime.ReasonVolume)
		}
	}
	if entries, _ := os.ReadDir(outside); len(entries) != 0 {
		t.Errorf("something was made outside: %v", entries)
	}
}

func TestOOMKills(t *testing.T) {
	root := t.TempDir()
	v1, v2 := filepath.Join(root, "memory"), filepath.Join(root, "unified")
	for path, text := range map[string]string{
		filepath.Join(v1, "w/one", "memory.oom_control"): "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
		filepath.Join(v2, "w/two", "memory.events"):      "low 0\nhigh 0\nmax 7\noom 3\noom_kill 1\noom_group_kill 0\n",
		filepath.Join(v2, "w/none", "memory.events"):     "low 0\nhigh 0\nmax 7\noom 0\noom_kill 0\n",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d := &Driver{cgroups: []string{filepath.Join(root, "cpu"), v1, v2}}
	for path, want := range map[string]int{"/w/one": 2, "/w/two": 1, "/w/none": 0, "/w/missing": 0} {
		if got := d.oomKills(path); got != want {
			t.Errorf("%s: %d kills, want %d", path, got, want)
		}
	}
}

// Where a host path leads counts, not how it is called.
func TestOpenHostPath(t *testing.T) {
	root := t.TempDir()
	at := func(name string) string { return filepath.Join(root, name) }
	for _, dir := range []string{"allowed/dir", "also/dir", "outside/secret"} {
		if err := os.MkdirAll(at(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(at("allowed/file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{
		"alias":                "allowed", // the settings' own may be a link
		"allowed/in":           "dir",
		"allowed/up":           "../outside/secret",
		"allowed/absolute":     at("outside"),
		"allowed/absolute-in":  at("allowed/dir"),
		"allowed/dir/round":    "../../allowed/dir",
		"allowed/proc":         "/proc/self/root/etc",
		"allowed/other":        "../also/dir",
		"allowed/loop":         "loop",
		"allowed/dir/up-twice": "../../outside",
	} {
		if err := os.Symlink(to, at(link)); err != nil {
			t.Fatal(err)
		}
	}
	d := unit()
	d.cfg.Policy.HostPaths = []string{at("allowed"), at("also"), at("alias"), at("allowed/file")}
	for path, want := range map[string]struct {
		reason runtime.Reason // "": it is opened
		is     string
	}{
		"allowed":                     {"", "allowed"},
		"allowed/dir":                 {"", "allowed/dir"},
		"allowed/file":                {"", "allowed/file"},
		"allowed/in":                  {"", "allowed/dir"},
		"alias/dir":                   {"", "allowed/dir"},
		"also/dir":                    {"", "also/dir"},
		"allowed-not":                 {runtime.ReasonNotAllowed, ""},
		".":                           {runtime.ReasonNotAllowed, ""},
		"outside/secret":              {runtime.ReasonNotAllowed, ""},
		"allowed/up":                  {runtime.ReasonNotAllowed, ""},
		"allowed/absolute/secret":     {runtime.ReasonNotAllowed, ""},
		"allowed/absolute-in":         {runtime.ReasonNotAllowed, ""},
		"allowed/dir/round":           {runtime.ReasonNotAllowed, ""},
		"allowed/proc":                {runtime.ReasonNotAllowed, ""},
		"allowed/other":               {runtime.ReasonNotAllowed, ""},
		"allowed/dir/up-twice/secret": {runtime.ReasonNotAllowed, ""},
		"allowed/missing":             {runtime.ReasonVolume, ""},
		"allowed/file/below":          {runtime.ReasonVolume, ""},
		"allowed/loop":                {runtime.ReasonVolume, ""},
	} {
		file, err := d.openHostPath(at(path))
		if want.reason != "" {
			var e *runtime.Error
			if !errors.As(err, &e) || e.Reason != want.reason || e.Permanent || !strings.Contains(e.Message, at(path)) {
				t.Errorf("%s: %v, want %s", path, err, want.reason)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		opened, openedErr := file.Stat()
		meant, meantErr := os.Stat(at(want.is))
		if openedErr != nil || meantErr != nil || !os.SameFile(opened, meant) {
			t.Errorf("%s is not %s: %v", path, want.is, errors.Join(openedErr, meantErr))
		}
		file.Close()
	}
	d.cfg.Policy.HostPaths = []string{"/"}
	for _, path := range []string{"/", at("allowed/absolute"), at("allowed/up")} {
		file, err := d.openHostPath(path)
		if err != nil {
			t.Errorf("%s, everything being allowed: %v", path, err)
			continue
		}
		file.Close()
	}
}
