package server

import (
	"slices"
	"strings"

	"go.einride.tech/aip/fieldmask"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store"
)

// updatable are the fields of a workspace that a caller can change.
var updatable = []string{"labels", "model", "spec"}

// checkMask refuses a mask with a path that can't be updated: nothing of a mask
// is ignored in silence (AIP-134, AIP-161).
func checkMask(mask *fieldmaskpb.FieldMask) error {
	var vs violations
	for _, path := range mask.GetPaths() {
		if path == fieldmask.WildcardPath {
			if len(mask.GetPaths()) > 1 {
				vs.add("update_mask", "must hold nothing else beside *")
			}
			continue
		}
		if problem := checkPath(path); problem != "" {
			vs.add("update_mask", "must hold labels, model, spec or fields of spec: %s", problem)
		}
	}
	return vs.err()
}

// checkPath returns what is wrong with a path, or nothing.
func checkPath(path string) string {
	fields := (&workspacev1.Workspace{}).ProtoReflect().Descriptor().Fields()
	segments := strings.Split(path, ".")
	for i, segment := range segments {
		field := fields.ByName(protoreflect.Name(segment))
		switch {
		case field == nil:
			return quote(path) + " is no field"
		case i == 0 && !slices.Contains(updatable, segment):
			return quote(path) + " can't be changed by a caller"
		case i == len(segments)-1:
			return ""
		case field.IsList() || field.IsMap() || field.Message() == nil || field.Message().ParentFile().Package() != "workspace.v1":
			return quote(path) + " is a part of a value that is only set as a whole"
		}
		fields = field.Message().Fields()
	}
	return ""
}

func quote(path string) string { return "`" + shorten(path, 100) + "`" }

// edited returns the workspace that an update of e would bring about: what a
// caller can change of it, and nothing else.
func edited(e *store.Editable, req *workspacev1.UpdateWorkspaceRequest) *workspacev1.Workspace {
	from := proto.CloneOf(&workspacev1.Workspace{
		Labels: req.GetWorkspace().GetLabels(),
		Model:  req.GetWorkspace().GetModel(),
		Spec:   req.GetWorkspace().GetSpec(),
	})
	to := proto.CloneOf(&workspacev1.Workspace{
		Labels: e.Labels,
		Model:  e.Model,
		Spec:   specToProto(&e.Spec),
	})
	fieldmask.Update(req.GetUpdateMask(), to, from)
	return to
}
