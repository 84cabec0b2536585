package sim

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// key is the one of an operation on one secret.
func (o *op) key() string {
	for key := range o.set {
		return key
	}
	return o.unset[0]
}

// call makes the RPC of an operation.
func (c *client) call(ctx context.Context, a *attempt) (ans answer, err error) {
	name := "workspaces/" + a.ws
	parent, prefix := name, name+"/"
	if a.ws == "" {
		parent, prefix = "global", ""
	}
	apply := workspacev1.Apply_APPLY_NOW
	switch {
	case a.nextStart:
		apply = workspacev1.Apply_APPLY_NEXT_START
	case a.live:
		apply = workspacev1.Apply_APPLY_LIVE
	}
	switch a.kind {
	case opBeat, opFetch:
		return c.callAsContainer(ctx, a)
	case opCreate:
		r, err := c.api.CreateWorkspace(ctx, &workspacev1.CreateWorkspaceRequest{
			WorkspaceId: a.ws, Workspace: newWorkspace(a.ws, a.fields[fieldImage]), Secrets: values(a.set),
			RequestId: a.request, ValidateOnly: a.validate,
		})
		return answer{message: r, workspace: r.GetWorkspace(), generation: r.GetGeneration(), changed: r.GetChanged()}, err
	case opGet:
		r, err := c.api.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: name})
		return answer{message: r, workspace: r.GetWorkspace(), generation: r.GetWorkspace().GetGeneration()}, err
	case opList:
		list, err := listWorkspaces(ctx, c.api, "", 2)
		return answer{workspaces: list}, err
	case opUpdate:
		w, mask := edited(name, a.fields)
		w.Etag = a.etagSent
		r, err := c.api.UpdateWorkspace(ctx, &workspacev1.UpdateWorkspaceRequest{
			Workspace: w, UpdateMask: mask, RequestId: a.request, ValidateOnly: a.validate,
		})
		return answer{message: r, workspace: r.GetWorkspace(), generation: r.GetGeneration(), changed: r.GetChanged()}, err
	case opDelete:
		r, err := c.api.DeleteWorkspace(ctx, &workspacev1.DeleteWorkspaceRequest{
			Name: name, KeepVolumes: a.keep, AllowMissing: a.missing, Etag: a.etagSent, RequestId: a.request, ValidateOnly: a.validate,
		})
		return answer{message: r, workspace: r.GetWorkspace(), generation: r.GetGeneration(), changed: r.GetChanged()}, err
	case opRestart:
		r, err := c.api.RestartWorkspace(ctx, &workspacev1.RestartWorkspaceRequest{Name: name, RequestId: a.request, ValidateOnly: a.validate})
		return answer{message: r, workspace: r.GetWorkspace(), generation: r.GetGeneration(), changed: r.GetChanged()}, err
	case opStop:
		r, err := c.api.StopWorkspace(ctx, &workspacev1.StopWorkspaceRequest{Name: name, RequestId: a.request, ValidateOnly: a.validate})
		return answer{message: r, workspace: r.GetWorkspace(), generation: r.GetGeneration(), changed: r.GetChanged()}, err
	case opStart:
		r, err := c.api.StartWorkspace(ctx, &workspacev1.StartWorkspaceRequest{Name: name, RequestId: a.request, ValidateOnly: a.validate})
		return answer{message: r, workspace: r.GetWorkspace(), generation: r.GetGeneration(), changed: r.GetChanged()}, err
	case opModel:
		r, err := c.api.SetModel(ctx, &workspacev1.SetModelRequest{
			Name: name, Model: a.fields[fieldModel], RequestId: a.request, ValidateOnly: a.validate,
		})
		return answer{message: r, workspace: r.GetWorkspace(), generation: r.GetGeneration(), changed: r.GetChanged()}, err
	case opSet:
		r, err := c.api.SetSecret(ctx, &workspacev1.SetSecretRequest{
			Name: prefix + "secrets/" + a.key(), Apply: apply, Etag: a.etagSent, RequestId: a.request, ValidateOnly: a.validate,
			Payload: &workspacev1.SetSecretRequest_Text{Text: secretValue(a.set[a.key()])}, Delivery: deliveryOf(a.key()),
		})
		ans := answer{message: r, generation: r.GetGeneration(), changed: r.GetChanged(), affected: r.GetAffectedWorkspaces()}
		if s := r.GetSecret(); s != nil {
			ans.secrets = append(ans.secrets, s)
		}
		return ans, err
	case opUnset:
		r, err := c.api.DeleteSecret(ctx, &workspacev1.DeleteSecretRequest{
			Name: prefix + "secrets/" + a.key(), Apply: apply, Etag: a.etagSent, AllowMissing: a.missing,
			RequestId: a.request, ValidateOnly: a.validate,
		})
		return answer{message: r, generation: r.GetGeneration(), changed: r.GetChanged(), affected: r.GetAffectedWorkspaces()}, err
	case opBatch:
		r, err := c.api.BatchUpdateSecrets(ctx, &workspacev1.BatchUpdateSecretsRequest{
			Parent: parent, Secrets: values(a.set), DeleteKeys: a.unset, Apply: apply, RequestId: a.request, ValidateOnly: a.validate,
		})
		return answer{message: r, secrets: r.GetSecrets(), generation: r.GetGeneration(), changed: r.GetChanged(), affected: r.GetAffectedWorkspaces()}, err
	case opListSecrets:
		list, err := listSecrets(ctx, c.api, parent)
		return answer{secrets: list}, err
	case opGetSecret:
		r, err := c.api.GetSecret(ctx, &workspacev1.GetSecretRequest{Name: prefix + "secrets/" + a.key()})
		ans := answer{message: r}
		if s := r.GetSecret(); s != nil {
			ans.secrets = append(ans.secrets, s)
		}
		return ans, err
	case opRollBack:
		r, err := c.api.RollBackSecret(ctx, &workspacev1.RollBackSecretRequest{
			Name: prefix + "secrets/" + a.key(), Version: a.version, Apply: apply, Etag: a.etagSent, RequestId: a.request, ValidateOnly: a.validate,
		})
		ans := answer{message: r, generation: r.GetGeneration(), changed: r.GetChanged(), affected: r.GetAffectedWorkspaces()}
		if s := r.GetSecret(); s != nil {
			ans.secrets = append(ans.secrets, s)
		}
		return ans, err
	case opVersions:
		r, err := c.api.ListSecretVersions(ctx, &workspacev1.ListSecretVersionsRequest{Parent: prefix + "secrets/" + a.key()})
		return answer{message: r, versions: r.GetSecretVersions()}, err
	case opEnable:
		r, err := c.api.EnableSecretVersion(ctx, &workspacev1.EnableSecretVersionRequest{
			Name: a.versionName(prefix), RequestId: a.request, ValidateOnly: a.validate,
		})
		return answer{message: r, generation: r.GetGeneration(), changed: r.GetChanged()}, err
	case opDisable:
		r, err := c.api.DisableSecretVersion(ctx, &workspacev1.DisableSecretVersionRequest{
			Name: a.versionName(prefix), RequestId: a.request, ValidateOnly: a.validate,
		})
		return answer{message: r, generation: r.GetGeneration(), changed: r.GetChanged()}, err
	case opDestroy:
		r, err := c.api.DestroySecretVersion(ctx, &workspacev1.DestroySecretVersionRequest{
			Name: a.versionName(prefix), RequestId: a.request, ValidateOnly: a.validate,
		})
		return answer{message: r, generation: r.GetGeneration(), changed: r.GetChanged()}, err
	case opWait:
		r, err := c.api.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: name, Generation: a.generation})
		return answer{message: r, workspace: r.GetWorkspace(), generation: r.GetWorkspace().GetGeneration()}, err
	}
	return answer{}, status.Error(codes.Unimplemented, "no such operation: "+a.kind)
}

func (o *op) versionName(prefix string) string {
	return fmt.Sprintf("%ssecrets/%s/versions/%d", prefix, o.key(), o.version)
}

func values(set map[string]string) (list []*workspacev1.SecretValue) {
	for _, key := range slices.Sorted(maps.Keys(set)) {
		list = append(list, &workspacev1.SecretValue{
			Key: key, Payload: &workspacev1.SecretValue_Data{Data: []byte(secretValue(set[key]))}, Delivery: deliveryOf(key),
		})
	}
	return list
}

// volume is what every workspace has.
const volume = "data"

// newWorkspace is what every workspace begins as.
func newWorkspace(id, image string) *workspacev1.Workspace {
	return &workspacev1.Workspace{Spec: &workspacev1.WorkspaceSpec{
		Image:           image,
		WorkspaceApi:    hasAPI(id),
		StopGracePeriod: durationpb.New(time.Second),
		CrashPolicy:     &workspacev1.CrashPolicy{Restart: workspacev1.CrashRestart_CRASH_RESTART_ALWAYS},
		Volumes:         []*workspacev1.Volume{{MountPath: "/data", Source: &workspacev1.Volume_VolumeName{VolumeName: volume}}},
	}}
}

// initial are the fields of a new workspace.
func initial(image string) map[string]string {
	return map[string]string{
		fieldImage: image, fieldEnv: "", fieldModelEnv: "", fieldLabel: "", fieldGrace: "1s", fieldPolicy: "ALWAYS/0",
		fieldModel: "", fieldParked: "false",
	}
}

// edited is an update that sets some fields.
func edited(name string, fields map[string]string) (*workspacev1.Workspace, *fieldmaskpb.FieldMask) {
	w := &workspacev1.Workspace{Name: name, Spec: &workspacev1.WorkspaceSpec{}}
	mask := &fieldmaskpb.FieldMask{}
	for _, field := range slices.Sorted(maps.Keys(fields)) {
		switch value := fields[field]; field {
		case fieldImage:
			w.Spec.Image = value
			mask.Paths = append(mask.Paths, "spec.image")
		case fieldEnv:
			w.Spec.Env = map[string]string{"PLAIN": value}
			mask.Paths = append(mask.Paths, "spec.env")
		case fieldModelEnv:
			if value != "" {
				w.Spec.ModelEnv = []string{value}
			}
			mask.Paths = append(mask.Paths, "spec.model_env")
		case fieldLabel:
			w.Labels = map[string]string{"team": value}
			mask.Paths = append(mask.Paths, "labels")
		case fieldGrace:
			grace, _ := time.ParseDuration(value)
			w.Spec.StopGracePeriod = durationpb.New(grace)
			mask.Paths = append(mask.Paths, "spec.stop_grace_period")
		case fieldPolicy:
			restart, retries, _ := strings.Cut(value, "/")
			n, _ := strconv.ParseInt(retries, 10, 32)
			w.Spec.CrashPolicy = &workspacev1.CrashPolicy{
				Restart:    workspacev1.CrashRestart(workspacev1.CrashRestart_value["CRASH_RESTART_"+restart]),
				MaxRetries: int32(n),
			}
			mask.Paths = append(mask.Paths, "spec.crash_policy")
		case fieldModel:
			w.Model = value
			mask.Paths = append(mask.Paths, "model")
		}
	}
	return w, mask
}

// fieldsOf reads the fields of a workspace.
func fieldsOf(w *workspacev1.Workspace) map[string]string {
	spec := w.GetSpec()
	policy := strings.TrimPrefix(spec.GetCrashPolicy().GetRestart().String(), "CRASH_RESTART_")
	return map[string]string{
		fieldImage:    spec.GetImage(),
		fieldEnv:      spec.GetEnv()["PLAIN"],
		fieldModelEnv: strings.Join(spec.GetModelEnv(), ","),
		fieldLabel:    w.GetLabels()["team"],
		fieldGrace:    spec.GetStopGracePeriod().AsDuration().String(),
		fieldPolicy:   fmt.Sprintf("%s/%d", policy, spec.GetCrashPolicy().GetMaxRetries()),
		fieldModel:    w.GetModel(),
		fieldParked:   fmt.Sprint(w.GetParked()),
	}
}

// listWorkspaces lists all, page by page.
func listWorkspaces(ctx context.Context, api workspacev1.WorkspaceControlClient, filter string, size int32) (list []*workspacev1.Workspace, err error) {
	for token := ""; ; {
		r, err := api.ListWorkspaces(ctx, &workspacev1.ListWorkspacesRequest{PageSize: size, PageToken: token, Filter: filter})
		if err != nil {
			return nil, err
		}
		list = append(list, r.GetWorkspaces()...)
		if token = r.GetNextPageToken(); token == "" {
			return list, nil
		}
	}
}

func listSecrets(ctx context.Context, api workspacev1.WorkspaceControlClient, parent string) (list []*workspacev1.Secret, err error) {
	for token := ""; ; {
		r, err := api.ListSecrets(ctx, &workspacev1.ListSecretsRequest{Parent: parent, PageSize: 2, PageToken: token})
		if err != nil {
			return nil, err
		}
		list = append(list, r.GetSecrets()...)
		if token = r.GetNextPageToken(); token == "" {
			return list, nil
		}
	}
}
