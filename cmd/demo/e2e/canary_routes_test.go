package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
)

// route is one way in which values come into the daemon. A new RPC or field that
// takes one needs a row; heard.checkAllCalled holds that for RPCs.
type route struct {
	name string // of the workspace too: letters, digits, hyphens
	// take goes it, with values of its own, and makes sure that they got there.
	take func(r *ride)
}

// routes are gone one after the other; what they have made stays for the search.
var routes = []route{
	{"set", func(r *ride) {
		r.create()
		v := r.value("own")
		r.set("OWN", v)
		r.runs("OWN", v)
	}},
	{"global", func(r *ride) {
		r.create()
		for _, v := range []string{r.value("old"), r.value("new")} {
			if _, err := r.client().SetSecret(r.ctx, &workspacev1.SetSecretRequest{
				Name: "secrets/GLOBAL", Payload: &workspacev1.SetSecretRequest_Text{Text: v},
			}); err != nil {
				r.t.Fatal(err)
			}
			r.runs("GLOBAL", v)
		}
		if _, err := r.client().DeleteSecret(r.ctx, &workspacev1.DeleteSecretRequest{Name: "secrets/GLOBAL"}); err != nil {
			r.t.Fatal(err)
		}
		r.runs("GLOBAL", "")
	}},
	{"create", func(r *ride) {
		a, b := r.value("a"), r.value("b")
		r.create("A", a, "B", b)
		r.runs("A", a, "B", b)
	}},
	{"replaced", func(r *ride) {
		r.create("KEY", r.value("old"))
		r.runs()
		v := r.value("new")
		r.set("KEY", v)
		r.runs("KEY", v)
	}},
	{"rolled-back", func(r *ride) {
		r.create("KEY", r.value("disabled later"))
		good, bad := r.value("good"), r.value("bad")
		r.set("KEY", good)
		r.set("KEY", bad)
		r.runs("KEY", bad)
		c, name := r.client(), r.secret("KEY")
		for _, step := range []func() error{
			func() error {
				_, err := c.RollBackSecret(r.ctx, &workspacev1.RollBackSecretRequest{Name: name, Version: 2, RequestId: "rolled-back"})
				return err
			},
			func() error {
				_, err := c.DisableSecretVersion(r.ctx, &workspacev1.DisableSecretVersionRequest{Name: name + "/versions/1"})
				return err
			},
			func() error {
				_, err := c.EnableSecretVersion(r.ctx, &workspacev1.EnableSecretVersionRequest{Name: name + "/versions/1"})
				return err
			},
			func() error {
				_, err := c.DestroySecretVersion(r.ctx, &workspacev1.DestroySecretVersionRequest{Name: name + "/versions/3"})
				return err
			},
			func() error {
				_, err := c.ListSecretVersions(r.ctx, &workspacev1.ListSecretVersionsRequest{Parent: name})
				return err
			},
		} {
			if err := step(); err != nil {
				r.t.Fatal(err)
			}
		}
		r.runs("KEY", good)
		if _, err := c.RollBackSecret(r.ctx, &workspacev1.RollBackSecretRequest{Name: name, Version: 3}); err == nil {
			r.t.Error("a destroyed version came back")
		}
	}},
	{"bytes", func(r *ride) {
		r.create()
		v := "\x01\n\"" + r.value("data")
		if _, err := r.client().SetSecret(r.ctx, &workspacev1.SetSecretRequest{
			Name: r.secret("KEY"), Payload: &workspacev1.SetSecretRequest_Data{Data: []byte(v)}, RequestId: "remembered",
		}); err != nil {
			r.t.Fatal(err)
		}
		r.runs("KEY", v)
	}},
	{"batch", func(r *ride) {
		r.create("GONE", r.value("deleted in a batch"))
		a, b := r.value("text"), r.value("data")
		if _, err := r.client().BatchUpdateSecrets(r.ctx, &workspacev1.BatchUpdateSecretsRequest{
			Parent: "workspaces/" + r.id,
			Secrets: []*workspacev1.SecretValue{
				secretText("A", a), {Key: "B", Payload: &workspacev1.SecretValue_Data{Data: []byte(b)}},
			},
			DeleteKeys: []string{"GONE"}, RequestId: "remembered-too",
		}); err != nil {
			r.t.Fatal(err)
		}
		r.runs("A", a, "B", b, "GONE", "")
	}},
	{"model", func(r *ride) {
		r.create()
		v := r.values.Value(modelName)
		if _, err := r.client().SetModel(r.ctx, &workspacev1.SetModelRequest{Name: "workspaces/" + r.id, Model: v}); err != nil {
			r.t.Fatal(err)
		}
		r.runs("MODEL_PROVIDER", v)
	}},
	{"deleted", func(r *ride) {
		r.create("KEY", r.value("deleted"))
		r.runs()
		if _, err := r.client().DeleteSecret(r.ctx, &workspacev1.DeleteSecretRequest{Name: r.secret("KEY")}); err != nil {
			r.t.Fatal(err)
		}
		r.runs("KEY", "")
	}},
	{"workspace-deleted", func(r *ride) {
		r.create("KEY", r.value("of a workspace that is gone"))
		r.runs()
		if _, err := r.client().DeleteWorkspace(r.ctx, &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/" + r.id}); err != nil {
			r.t.Fatal(err)
		}
		r.gone(r.id)
	}},
	{"next-start", func(r *ride) {
		r.create("KEY", r.value("old"))
		r.runs()
		v := r.value("staged")
		req := setSecret(r.id, "KEY", v)
		req.Apply = workspacev1.Apply_APPLY_NEXT_START
		if _, err := r.client().SetSecret(r.ctx, req); err != nil {
			r.t.Fatal(err)
		}
		if _, err := r.client().RestartWorkspace(r.ctx, &workspacev1.RestartWorkspaceRequest{Name: "workspaces/" + r.id}); err != nil {
			r.t.Fatal(err)
		}
		r.runs("KEY", v)
	}},
	{"stopped", func(r *ride) {
		r.create("KEY", r.value("old"))
		r.runs()
		if _, err := r.client().StopWorkspace(r.ctx, &workspacev1.StopWorkspaceRequest{Name: "workspaces/" + r.id}); err != nil {
			r.t.Fatal(err)
		}
		r.until(r.id, "STOPPED", func(w *workspacev1.Workspace) bool { return w.State == stopped })
		v := r.value("set meanwhile")
		r.set("KEY", v)
		if _, err := r.client().StartWorkspace(r.ctx, &workspacev1.StartWorkspaceRequest{Name: "workspaces/" + r.id}); err != nil {
			r.t.Fatal(err)
		}
		r.runs("KEY", v)
	}},
	{"file", func(r *ride) {
		r.create("KEY", r.value("no file yet"))
		r.runs()
		v := r.value("file")
		req := setSecret(r.id, "KEY", v)
		req.Delivery = workspacev1.SecretDelivery_SECRET_DELIVERY_FILES
		if _, err := r.client().SetSecret(r.ctx, req); err != nil {
			r.t.Fatal(err)
		}
		r.runs("KEY", "")
		r.hasFile("KEY", v)
	}},
	{"files-by-spec", func(r *ride) {
		spec := r.spec()
		spec.SecretDelivery = workspacev1.SecretDelivery_SECRET_DELIVERY_FILES
		r.createSpec(spec, "OLD", r.value("old file"), "TEXT", r.value("replaced file"))
		r.runs()
		v, data := r.value("text"), "\x00\xff"+r.value("bytes")
		if _, err := r.client().BatchUpdateSecrets(r.ctx, &workspacev1.BatchUpdateSecretsRequest{
			Parent: "workspaces/" + r.id,
			Secrets: []*workspacev1.SecretValue{
				secretText("TEXT", v), {Key: "DATA", Payload: &workspacev1.SecretValue_Data{Data: []byte(data)}},
			},
			DeleteKeys: []string{"OLD"},
		}); err != nil {
			r.t.Fatal(err)
		}
		r.runs("TEXT", "", "DATA", "", "OLD", "")
		r.hasFile("TEXT", v)
		r.hasFile("DATA", data)
	}},
	{"live", func(r *ride) {
		spec := r.spec()
		spec.SecretDelivery = workspacev1.SecretDelivery_SECRET_DELIVERY_FILES
		spec.LiveSignal = "SIGWINCH" // which the program does not mind
		r.createSpec(spec, "KEY", r.value("old file"))
		r.runs()
		v := r.value("changed in place")
		req := setSecret(r.id, "KEY", v)
		req.Apply = workspacev1.Apply_APPLY_LIVE
		resp, err := r.client().SetSecret(r.ctx, req)
		if err != nil {
			r.t.Fatal(err)
		}
		r.wait(r.id, resp.Generation)
		r.hasFile("KEY", v)
	}},
	{"key-rotation", func(r *ride) {
		v := r.value("sealed anew")
		r.create("KEY", v)
		r.runs()
		admin := workspacev1.NewAdminControlClient(r.Daemon.Conn())
		if _, err := admin.RotateKey(r.ctx, &workspacev1.RotateKeyRequest{}); err != nil {
			r.t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(r.ctx, time.Minute)
		defer cancel()
		r.poll(ctx, func() error {
			info, err := admin.GetServerInfo(ctx, &workspacev1.GetServerInfoRequest{})
			if state := info.GetDataKeys().GetState(); err == nil && state != workspacev1.DataKeysState_DATA_KEYS_STATE_SETTLED {
				err = fmt.Errorf("the data keys are %v", state)
			}
			return err
		})
		if _, err := r.client().RestartWorkspace(r.ctx, &workspacev1.RestartWorkspaceRequest{Name: "workspaces/" + r.id}); err != nil {
			r.t.Fatal(err)
		}
		r.runs("KEY", v)
	}},
	{"token", takeToken},
	{"container-token", takeContainerToken},
	{"refused", takeRefused},
	{"no-image", func(r *ride) {
		v := r.value("old")
		r.create("KEY", v)
		r.runs()
		r.update(r.id, &workspacev1.WorkspaceSpec{Image: r.Registry.Host + "/nowhere:1"}, "spec.image")
		r.set("KEY", r.value("that no container gets"))
		r.degraded("IMAGE_NOT_FOUND", "KEY", v)
	}},
	{"exec-fails", func(r *ride) {
		r.create("KEY", r.value("old"))
		r.runs()
		v := r.value("with a command that can't be executed")
		r.update(r.id, &workspacev1.WorkspaceSpec{Command: []string{"/broken"}}, "spec.command")
		r.set("KEY", v) // the last good command gets it
		r.degraded("COMMAND_WRONG_ARCHITECTURE", "KEY", v)
	}},
	{"container-crash", func(r *ride) {
		r.crashInside("any", false, r.value("in a container of which a process crashes"))
	}},
	// The control of the row before: where a program asks for a core file the value is
	// in it, and found.
	{"container-core", func(r *ride) {
		r.crashInside("core", true, r.values.Value(controlName+": in a core file"))
	}},
}

// interruptions are routes on which the daemon fails.
var interruptions = []route{
	{"error-in-the-switch", func(r *ride) {
		r.failing(fault.Rule{Step: "fifo.write", Moment: fault.Before, Action: fault.Error, Times: 1})
	}},
	{"panic-in-the-switch", func(r *ride) {
		r.failing(
			fault.Rule{Step: "secrets.late", Moment: fault.After, Action: fault.Panic, Times: 1},
			fault.Rule{Step: "fifo.write", Moment: fault.After, Action: fault.Panic, Times: 1},
		)
	}},
	{"killed-at-the-commit", func(r *ride) { r.killed("store.commit", fault.Before) }},
	{"killed-in-the-switch", func(r *ride) { r.killed("fifo.write", fault.After) }},
}

// takeContainerToken has containers fetch their secrets, each with a token of its own.
func takeContainerToken(r *ride) {
	spec := r.spec()
	spec.WorkspaceApi = true
	v := r.value("fetched")
	r.createSpec(spec, "KEY", v)
	fetch := &workspacev1.FetchSecretsRequest{Name: "workspaces/" + r.id}
	call := func(method, token string, want codes.Code, req, resp proto.Message) {
		r.t.Helper()
		code, message := r.callInside(r.id, method, token, req, resp)
		if code != want {
			r.t.Errorf("%s from inside: %v, want %v", method, code, want)
		}
		r.heard.fromInside(method, message)
	}
	for _, kind := range []string{"first", "next"} {
		token := r.inside(r.id, r.wait(r.id, 0).ObservedGeneration)["WORKSPACE_TOKEN"]
		hidden, ok := strings.CutPrefix(token, "wsi_"+r.id+"_")
		if !ok {
			r.t.Fatal("the container has no token")
		}
		r.values.Add(r.name+": "+kind, hidden)
		got := new(workspacev1.FetchSecretsResponse)
		call(workspacev1.WorkspaceControl_FetchSecrets_FullMethodName, "", codes.OK, fetch, got)
		if len(got.Secrets) != 1 || string(got.Secrets[0].Value) != v {
			r.t.Error("the container did not get its secret: the test proves nothing")
		}
		call(workspacev1.WorkspaceControl_Heartbeat_FullMethodName, "", codes.OK, &workspacev1.HeartbeatRequest{Name: fetch.Name}, new(workspacev1.HeartbeatResponse))
		call(workspacev1.WorkspaceControl_FetchSecrets_FullMethodName, r.value(kind+", no token"), codes.Unauthenticated, fetch, nil)
		v = r.value("fetched after " + kind)
		r.set("KEY", v)
	}
}

// takeToken makes, shows and revokes a bearer token, which the daemon makes up.
func takeToken(r *ride) {
	admin := workspacev1.NewAdminControlClient(r.Daemon.Conn())
	made, err := admin.CreateToken(r.ctx, &workspacev1.CreateTokenRequest{
		Token: &workspacev1.Token{Subject: r.control, Roles: []workspacev1.Role{workspacev1.Role_ROLE_VIEWER}},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	hidden, ok := strings.CutPrefix(made.Secret, made.Token.Prefix)
	if !ok {
		r.t.Fatal("the token does not begin with what is shown of it")
	}
	r.values.Add(r.name+": hidden part", hidden)
	show := func(want codes.Code, token string) {
		r.t.Helper()
		ctx := metadata.AppendToOutgoingContext(r.ctx, "authorization", "Bearer "+token)
		if _, err := r.client().ListWorkspaces(ctx, &workspacev1.ListWorkspacesRequest{}); status.Code(err) != want {
			r.t.Errorf("a call with a token: %v, want %v", err, want)
		}
	}
	show(codes.OK, made.Secret)
	show(codes.Unauthenticated, r.value("no token"))
	if _, err := admin.ListTokens(r.ctx, &workspacev1.ListTokensRequest{}); err != nil {
		r.t.Error(err)
	}
	if _, err := admin.RevokeToken(r.ctx, &workspacev1.RevokeTokenRequest{Name: made.Token.Name}); err != nil {
		r.t.Error(err)
	}
	show(codes.Unauthenticated, made.Secret)
}

// takeRefused gives values to calls that don't take them.
func takeRefused(r *ride) {
	r.create()
	c := r.client()
	set := func(name, value string) (any, error) {
		return c.SetSecret(r.ctx, &workspacev1.SetSecretRequest{Name: name, Payload: &workspacev1.SetSecretRequest_Text{Text: value}})
	}
	for _, tt := range []struct {
		name string
		code codes.Code
		call func(v string) (any, error)
	}{
		{"NUL", codes.FailedPrecondition, func(v string) (any, error) { return set(r.secret("KEY"), v+"\x00") }},
		{"too long", codes.InvalidArgument, func(v string) (any, error) { return set(r.secret("KEY"), strings.Repeat(v, 3000)) }},
		{"key", codes.InvalidArgument, func(v string) (any, error) { return set(r.secret("BAD-KEY"), v) }},
		{"reserved", codes.InvalidArgument, func(v string) (any, error) { return set(r.secret("WORKSPACE_X"), v) }},
		{"no workspace", codes.NotFound, func(v string) (any, error) { return set("workspaces/missing-"+r.control+"/secrets/KEY", v) }},
		{"etag", codes.Aborted, func(v string) (any, error) {
			req := setSecret(r.id, "KEY", v)
			req.Etag = `"v99"`
			return c.SetSecret(r.ctx, req)
		}},
		{"request id", codes.InvalidArgument, func(v string) (any, error) {
			req := setSecret(r.id, "KEY", v)
			req.RequestId = "with a space"
			return c.SetSecret(r.ctx, req)
		}},
		{"twice", codes.InvalidArgument, func(v string) (any, error) {
			return c.BatchUpdateSecrets(r.ctx, &workspacev1.BatchUpdateSecretsRequest{
				Parent: "workspaces/" + r.id, Secrets: []*workspacev1.SecretValue{secretText("KEY", v), secretText("KEY", v)},
			})
		}},
		{"exists", codes.AlreadyExists, func(v string) (any, error) {
			return c.CreateWorkspace(r.ctx, &workspacev1.CreateWorkspaceRequest{
				WorkspaceId: r.id, Workspace: &workspacev1.Workspace{Spec: r.spec()}, Secrets: []*workspacev1.SecretValue{secretText("KEY", v)},
			})
		}},
		{"only checked", codes.OK, func(v string) (any, error) {
			return c.CreateWorkspace(r.ctx, &workspacev1.CreateWorkspaceRequest{
				WorkspaceId: r.id + "-2", Workspace: &workspacev1.Workspace{Spec: r.spec()}, Secrets: []*workspacev1.SecretValue{secretText("KEY", v)},
				ValidateOnly: true,
			})
		}},
	} {
		if _, err := tt.call(r.value(tt.name)); status.Code(err) != tt.code {
			r.t.Errorf("%s: %v, want %v", tt.name, err, tt.code)
		}
	}
	r.runs("KEY", "")
}

// hasFile checks a secret that is a file in the workspace's container.
func (r *ride) hasFile(key, want string) {
	r.t.Helper()
	got, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/run/secrets/%s", r.get(r.id).Pid, key))
	if err != nil || string(got) != want {
		r.t.Errorf("file %s is %q, %v, want %q: the test proves nothing", key, got, err, want)
	}
}

// degraded waits until the newest generation has failed, and looks at what runs.
func (r *ride) degraded(reason string, values ...string) {
	r.t.Helper()
	w := r.until(r.id, "DEGRADED for "+reason, func(w *workspacev1.Workspace) bool {
		return w.State == degraded && w.LastError.GetReason() == reason
	})
	r.sees(w, values...)
}

// crashInside runs a container in which a process crashes that has the value in its
// memory. Whether that leaves a core file, its parent knows, wherever that would be.
func (r *ride) crashInside(how string, wantCore bool, v string) {
	r.t.Helper()
	spec := r.spec()
	spec.Env["ENVSERVER_CRASH"] = how
	r.createSpec(spec, "KEY", v)
	r.runs("KEY", v) // it serves afterwards
	ctx, cancel := context.WithTimeout(r.ctx, 20*time.Second)
	defer cancel()
	r.poll(ctx, func() error { // the log comes by way of the shim
		log, err := os.ReadFile(filepath.Join(r.Daemon.DataDir(), "logs", r.id+".log"))
		if want := fmt.Sprintln("core file written:", wantCore); err == nil && !strings.Contains(string(log), want) {
			err = fmt.Errorf("no %q in the container's log: %s", want, log)
		}
		return err
	})
}

// failing changes a secret while steps of the daemon fail.
func (r *ride) failing(rules ...fault.Rule) {
	r.t.Helper()
	r.create()
	r.runs()
	var v string
	for _, rule := range rules {
		if err := r.Daemon.SetFaults(rule.String()); err != nil {
			r.t.Fatal(err)
		}
		v = r.value(fmt.Sprint("on its way at ", rule.Step))
		r.wait(r.id, r.set("KEY", v))
		struck, err := r.Daemon.Struck()
		if err != nil || struck[fmt.Sprintf("%s:%s:%s", rule.Step, rule.Moment, rule.Action)] == 0 {
			r.t.Errorf("%s: struck %v, %v", rule, struck, err)
		}
	}
	if err := r.Daemon.SetFaults(); err != nil {
		r.t.Fatal(err)
	}
	r.runs("KEY", v)
}

// killed changes a secret while the daemon kills itself at a step. Whether a commit
// counts that it was killed at, nobody knows: it is repeated.
func (r *ride) killed(step string, moment fault.Moment) {
	r.t.Helper()
	r.create("KEY", r.value("old"))
	r.runs()
	rule := fault.Rule{Step: step, Moment: moment, Action: fault.Kill, Times: 1}
	if err := r.Daemon.SetFaults(rule.String()); err != nil {
		r.t.Fatal(err)
	}
	v := r.value("in the middle")
	_, setErr := r.client().SetSecret(r.ctx, setSecret(r.id, "KEY", v))
	if err := r.Daemon.WaitKilled(r.ctx); err != nil {
		r.t.Fatal(err)
	}
	if err := r.Daemon.SetFaults(); err != nil {
		r.t.Fatal(err)
	}
	r.start()
	if setErr != nil {
		r.set("KEY", v)
	}
	r.runs("KEY", v)
}
