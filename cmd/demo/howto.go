package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/workspaced/workspaced/cmd/internal/lab"
)

// howTo are ready-made lines; README.md has the same with more words. They take
// their places from the variables in its first lines.
const howTo = `
workspaced is ready. Its API is on the unix socket
  @SOCK@

In another terminal:

@PATH@  export SOCK=@SOCK@ DEMO=@DEMO@

  # create a workspace, with a secret, and wait until it runs
  grpcurl -plaintext -unix -d '{"workspace_id": "hello", "workspace": {"spec": {"image": "@IMAGE@", "env": {"ENVSERVER_SOCKET": "/demo/hello.sock"}, "volumes": [{"mount_path": "/demo", "host_path": "'$DEMO'"}]}}, "secrets": [{"key": "API_KEY", "text": "first"}]}' $SOCK workspace.v1.WorkspaceControl/CreateWorkspace
  grpcurl -plaintext -unix -d '{"name": "workspaces/hello"}' $SOCK workspace.v1.WorkspaceControl/WaitWorkspace

  # change the secret, wait, and look at the environment from inside
  grpcurl -plaintext -unix -d '{"name": "workspaces/hello/secrets/API_KEY", "text": "second"}' $SOCK workspace.v1.WorkspaceControl/SetSecret
  grpcurl -plaintext -unix -d '{"name": "workspaces/hello"}' $SOCK workspace.v1.WorkspaceControl/WaitWorkspace
  @ENV@

  # watch, list, delete
  grpcurl -plaintext -unix -d '{}' $SOCK workspace.v1.WorkspaceControl/WatchWorkspaces
  grpcurl -plaintext -unix -d '{}' $SOCK workspace.v1.WorkspaceControl/ListWorkspaces
  grpcurl -plaintext -unix -d '{"name": "workspaces/hello"}' $SOCK workspace.v1.WorkspaceControl/DeleteWorkspace

The daemon's log is @LOG@. Ctrl-C stops it and removes everything.
`

// printHowTo says how to talk to the daemon with what is there on this machine.
func printHowTo(s *lab.Stage, out io.Writer) {
	path := ""
	env := "curl --silent --retry 3 --retry-all-errors --unix-socket $DEMO/hello.sock http://hello/env"
	if exe, err := os.Executable(); err == nil {
		if pinned := filepath.Join(filepath.Dir(exe), "tools", "grpcurl"); isFile(pinned) {
			path = "  export PATH=" + filepath.Dir(pinned) + ":$PATH\n"
		}
		if _, err := exec.LookPath("curl"); err != nil {
			env = exe + " env $DEMO/hello.sock"
		}
	}
	fmt.Fprint(out, strings.NewReplacer(
		"@SOCK@", s.Daemon.Socket(),
		"@DEMO@", s.VolumeDir,
		"@PATH@", path,
		"@IMAGE@", lab.DemoImage,
		"@ENV@", env,
		"@LOG@", s.Daemon.LogFile(),
	).Replace(howTo))
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}
